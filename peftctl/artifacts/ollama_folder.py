"""A folder that `ollama create` reads: model/, adapter/ where it is not merged, a Modelfile, and a README.

What Ollama converts itself: https://docs.ollama.com/import and https://docs.ollama.com/modelfile. Written by the
published format; the template is proven by rendering (ollama.py), the rest is not run through Ollama here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from peftctl.artifacts.checks import ADAPTER_WEIGHTS, check_weights, read_keys
from peftctl.artifacts.dtypes import stored_dtype
from peftctl.artifacts.export_card import base_licence
from peftctl.artifacts.load import base_section, load_base, tokenizer_of
from peftctl.artifacts.locate import ADAPTER_CONFIG, Artefact
from peftctl.artifacts.manifest import read_json
from peftctl.artifacts.ollama import Choice, choose, modelfile
from peftctl.errors import UsageError
from peftctl.models.aliases import resolve
from peftctl.models.load import load_tokenizer, meta_model
from peftctl.recipe.schema import ModelSection

# Architectures whose safetensors Ollama reads, with or without an adapter beside them.
_WITH_ADAPTER = ("LlamaForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM")
ARCHITECTURES = (
    *_WITH_ADAPTER, "MixtralForCausalLM", "GemmaForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM",
    "Qwen2ForCausalLM", "Qwen3ForCausalLM",
)  # fmt: skip
_ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# More positions than this are reserved only where the user asks: the cache of keys and values grows with them.
MAX_CONTEXT = 8192
# sha256 of the `Split` patterns of tokenizers that Ollama's converter recognises: Llama 3, Qwen 2, and none at all.
_KNOWN_SPLITS = (
    "d98f9631be1e9607a9848c26c1f9eac1aa9fc21ac6ba82a2fc0741af9780a48f",
    "1ff7f41064896984db5d1bb6ff64fa4bc29007d08c1b439e505b7392777a319e",
)
_README = """# For Ollama

```bash
ollama create NAME -f Modelfile
ollama run NAME
```

The TEMPLATE (FAMILY) was compared with what the model was trained on: same text, same token ids, on conversations with
one and several turns, with and without a system message. Releases of Ollama that convert no safetensors of this
architecture want a GGUF: convert `model/` with llama.cpp's `convert_hf_to_gguf.py` and change `FROM ./model` to
`FROM ./model.gguf`; the rest of the Modelfile stays.
"""


def write(artefact: Artefact, folder: Path, *, merged: bool, fold: Callable[[Path], Any]) -> tuple[Choice, list[str]]:
    """Write the folder; what can be refused is refused before any weights are touched.

    Args:
        artefact: A run's result, an adapter or a model directory.
        folder: Does not exist yet.
        merged: Fold an adapter into the model.
        fold: Writes the merged model into a directory.

    Returns:
        How conversations are written, and notices.

    Raises:
        UsageError: Ollama reads no such architecture, adapter or tokenizer, or no template of the table fits.
    """
    section = _section(artefact)
    beside = artefact.is_adapter and artefact.has_weights and not merged
    config = _refuse_architecture(section, artefact, beside)
    tokenizer = tokenizer_of(artefact) if artefact.is_adapter else load_tokenizer(section)
    choice = choose(tokenizer, artefact.manifest.get("template", "chat"), artefact.target)
    vocabulary = _vocabulary(tokenizer, artefact, section)
    folder.mkdir()
    if not artefact.is_adapter:
        shutil.copytree(str(artefact.folder), folder / "model")
    elif artefact.has_weights and merged:
        fold(folder / "model")
    else:
        load_base(artefact, dtype=stored_dtype(section)).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    check_weights(folder / "model")
    if beside:
        shutil.copytree(str(artefact.folder), folder / "adapter")
    if vocabulary is not None:
        shutil.copyfile(vocabulary, folder / "model" / "tokenizer.model")
    _state_bos(folder / "model", choice)
    licence = base_licence(artefact.base)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    context = min(positions, MAX_CONTEXT) if positions else None
    text = modelfile(choice, context=context, adapter=beside, license=licence[1] if licence else None)
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(_readme(choice), encoding="utf-8")
    return choice, [*choice.notices, *_split_notice(tokenizer, vocabulary)]


def _section(artefact: Artefact) -> ModelSection:
    if artefact.is_adapter:
        return base_section(artefact)
    return ModelSection(name_or_path=str(artefact.folder), task=artefact.manifest.get("task", "causal_lm"))


def _refuse_architecture(section: ModelSection, artefact: Artefact, beside: bool) -> Any:
    """Return the model's configuration, if Ollama reads such a model."""
    if section.task != "causal_lm":
        raise UsageError(f"{artefact.target}: --format ollama takes causal_lm models, this one is for {section.task}")
    model = meta_model(section)
    name = type(model).__name__
    if name not in ARCHITECTURES:
        raise UsageError(
            f"{artefact.target}: Ollama imports no safetensors of {name}; it takes {', '.join(ARCHITECTURES)}"
        )
    if beside:
        _refuse_adapter(artefact, name)
    return model.config


def _refuse_adapter(artefact: Artefact, architecture: str) -> None:
    assert artefact.folder is not None  # an adapter with weights lies in a directory
    config = read_json(artefact.folder / ADAPTER_CONFIG)
    keys = read_keys(artefact.folder / ADAPTER_WEIGHTS)
    other = sorted(k for k in keys if k.rsplit(".lora_", 1)[0].rsplit(".", 1)[-1] not in _ADAPTED)
    held = {
        f"an adapter on {architecture}": architecture not in _WITH_ADAPTER,
        f"an adapter of type {config.get('peft_type')}": config.get("peft_type") != "LORA",
        "DoRA": bool(config.get("use_dora")),
        "rank-stabilised scaling": bool(config.get("use_rslora")),
        "ranks or alphas that differ by layer": bool(config.get("rank_pattern") or config.get("alpha_pattern")),
        "an alpha that is no whole number": config.get("lora_alpha", 1) != int(config.get("lora_alpha", 1)),
        f"the adapter's tensor {other[0] if other else ''}": bool(other),
    }
    for name, found in held.items():
        if found:
            raise UsageError(f"{artefact.target}: Ollama can't take {name} beside its base; leave out --no-merged")


def _vocabulary(tokenizer: Any, artefact: Artefact, section: ModelSection) -> Path | None:
    """Return tokenizer.model where Ollama needs it: it reads tokenizer.json as byte-level BPE only.

    Raises:
        UsageError: It is needed and lies neither with the artefact nor with its base.
    """
    if "ByteLevel" in json.dumps(_pre_tokenizer(tokenizer)):
        return None
    place = Path(resolve(section.name_or_path)).expanduser()
    for folder in filter(None, (artefact.folder, place)):
        if (folder / "tokenizer.model").is_file():
            return folder / "tokenizer.model"
    cached = None if place.is_absolute() else try_to_load_from_cache(str(place), "tokenizer.model")
    if isinstance(cached, str):
        return Path(cached)
    raise UsageError(
        f"{artefact.target}: Ollama reads tokenizers that are not byte-level BPE from tokenizer.model, and there is "
        "none; copy the base model's own into the directory"
    )


def _pre_tokenizer(tokenizer: Any) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str()).get("pre_tokenizer") or {}


def _split_notice(tokenizer: Any, vocabulary: Path | None) -> list[str]:
    """Tell where Ollama's converter would not know how the tokenizer splits text before BPE."""
    if vocabulary is not None:
        return []
    steps = _pre_tokenizer(tokenizer).get("pretokenizers", [])
    patterns = "".join(step.get("pattern", {}).get("Regex", "") for step in steps if step.get("type") == "Split")
    if hashlib.sha256(patterns.encode()).hexdigest() in _KNOWN_SPLITS:
        return []
    return [
        "Ollama's own conversion may split this tokenizer's text differently; compare some answers, or convert model/ "
        "with llama.cpp's convert_hf_to_gguf.py and write FROM ./model.gguf"
    ]


def _state_bos(folder: Path, choice: Choice) -> None:
    """Say in tokenizer_config.json whether a BOS goes before the text: the template writes it where there is one."""
    file = folder / "tokenizer_config.json"
    content = read_json(file) | {"add_bos_token": choice.bos}
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _readme(choice: Choice) -> str:
    return _README.replace("FAMILY", choice.family)
