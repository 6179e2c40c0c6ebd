"""Run as a script, in a process of its own: load artefacts and write the logits that they answer with.

    reload.py peftctl|peft JOBS

JOBS is a JSON list of {"artefact", "base", "auto_class", "options", "rows", "out"}. With `peftctl` a run directory is
loaded by `peftctl.load`; with `peft` adapter/ or model/ by transformers and peft alone. What fails is written as text.
"""

import json
import sys
import warnings
from pathlib import Path

import torch


def answers(model, rows):
    """Return the logits of some rows, one forward a row; an encoder-decoder writes what it reads."""
    pieces = []
    for row in rows:
        ids = torch.tensor([row])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=ids)
        with torch.no_grad():
            logits = model(**inputs).logits
        pieces.append(logits.reshape(-1, logits.shape[-1]))
    return torch.cat(pieces)


def load_plainly(job):
    """Load with what every user of peft has."""
    import transformers
    from peft import PeftModel

    artefact = Path(job["artefact"])
    auto_class = getattr(transformers, job["auto_class"])
    if artefact.name == "model":
        model = auto_class.from_pretrained(artefact)
    elif (artefact / "adapter_config.json").is_file():
        model = PeftModel.from_pretrained(auto_class.from_pretrained(job["base"], **job["options"]), artefact)
    else:
        model = auto_class.from_pretrained(job["base"])
    assert not any(name.split(".")[0] in ("peftctl", "tests") for name in sys.modules)
    return model.eval()


def load_with_peftctl(job):
    """Load as a user of peftctl does."""
    import peftctl

    return peftctl.load(job["artefact"])[0]


def main():
    """Work through the jobs."""
    load = {"peftctl": load_with_peftctl, "peft": load_plainly}[sys.argv[1]]
    warnings.simplefilter("ignore")
    for job in json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")):
        try:
            torch.save(answers(load(job), job["rows"]), job["out"])
        except Exception as error:
            Path(job["out"]).with_suffix(".txt").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")


if __name__ == "__main__":
    main()
