import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from peftctl.artifacts.checks import probe_logits
from peftctl.artifacts.export import export
from peftctl.artifacts.load import load
from peftctl.artifacts.merge import merge
from peftctl.artifacts.vllm import vllm_notices
from peftctl.errors import ArtifactError, UsageError
from tests.artifacts.helpers import ROWS, lora_run
from tests.tiny import CHATML, save_tiny, tiny_opt

SUMMARY = {
    "trainable_parameters": 12_345, "total_parameters": 67_890, "steps": 7, "train_tokens": 4_321, "train_loss": 0.75,
    "supervised_tokens": 1_234, "train_seconds": 9.5, "peak_memory_bytes": 3 * 2**30,
    "eval": {"before": {"loss": 2.5}, "after": {"loss": 0.5, "exact_match": 1.0}},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with figures, over a base with a licence; tests must not write into it."""
    folder = tmp_path_factory.mktemp("figures")
    run, logits = lora_run(folder)
    (folder / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# the base\n")
    run.write_json(run.summary, SUMMARY)
    run.write_json(run.environment, {"data_fingerprint": "feed" * 16})
    run.write_json(run.eval, {"metrics": {}, "tasks": {"tea": {"acc": 0.625}}})
    return run, logits


def front_matter(folder):
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])


def snippet_logits(folder, cwd):
    """Run the card's own Python in a fresh process that can't import peftctl; return its logits on the first row."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    code = code.replace("DIRECTORY", str(folder)) + (
        "import sys, torch\nassert 'peftctl' not in sys.modules and len(tokenizer) > 0\n"
        f"print(model.eval()(input_ids=torch.tensor([{ROWS[0]}])).logits[0, -1, :5].tolist())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**environment, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout.strip().splitlines()[-1]))


# -- hf --------------------------------------------------------------------------------------------------------------


def test_an_adapter_is_copied_whole(finished, tmp_path):
    run, reference = finished
    done = export(run.path, "hf", tmp_path / "out")
    assert (done.output, done.content, done.template, done.notices) == (tmp_path / "out", "adapter", None, ())
    for file in run.adapter.iterdir():
        if file.name != "README.md":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    model, _ = load(tmp_path / "out")
    torch.testing.assert_close(probe_logits(model, ROWS), reference, atol=0, rtol=0)


def test_the_cards_own_lines_load_it_without_peftctl(run, tmp_path):
    _, logits = run
    export(run[0].path, "hf", tmp_path / "out")
    torch.testing.assert_close(snippet_logits(tmp_path / "out", tmp_path), logits[len(ROWS[0]) - 1, :5])


def test_the_card_says_what_the_run_was(run, tmp_path):
    export(run[0].path, "hf", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for part in (
        "| method | LoRA (Hu et al. 2021, arXiv 2106.09685) |", "| base model | `base` |", "| optimizer steps | 7 |",
        "| licence of the base | apache-2.0 |", f"| data (fingerprint) | {'feed' * 16} |", "| training loss | 0.75 |",
        "| tokens seen | 4,321 |", "| of them trained on | 1,234 |", "| peak memory | 3.00 GiB |",
        "| loss | 2.5 | 0.5 |",
        "| exact_match |  | 1 |", "| tea | acc | 0.625 |", "chat template that comes with the tokenizer",
    ):  # fmt: skip
        assert part in card, part
    head = front_matter(tmp_path / "out")
    assert head["library_name"] == "peft" and head["license"] == "apache-2.0" and head["tags"] == ["peftctl", "lora"]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"base": {"quantization": {"bits": 4}}}, "Trained over a base quantised to 4 bits"),
        ({"template": "Q: {prompt}\nA:"}, 'single requests in the template `"Q: {prompt}\\nA:"`'),
        ({"config_changes": {"vocab_size": 404}}, "base.resize_token_embeddings(404)"),
    ],
)
def test_the_card_says_what_is_special(run, tmp_path, changes, part):
    adapter = shutil.copytree(run[0].adapter, tmp_path / "adapter")
    record = json.loads((adapter / "peftctl.json").read_text())
    for key, value in changes.items():
        record[key] = {**record[key], **value} if key == "base" else value
    (adapter / "peftctl.json").write_text(json.dumps(record))
    export(adapter, "hf", tmp_path / "out")
    assert part in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_the_licence_of_a_base_without_a_card_is_that_of_its_file(finished, tmp_path):
    from peftctl.artifacts.export_card import base_licence

    (tmp_path / "LICENSE").write_text("\n   Apache License\n  Version 2.0, January 2004\n more\n")
    assert base_licence(str(tmp_path)) == (None, "Apache License Version 2.0, January 2004")
    assert base_licence(str(finished[0].path)) is None and base_licence(None) is None


def test_merged_on_the_way(run, tmp_path):
    _, reference = run
    done = export(run[0].path, "hf", tmp_path / "out", merged=True, rows=ROWS)
    assert done.content == "model" and not (tmp_path / "out" / "adapter_config.json").exists()
    model, _ = load(tmp_path / "out")
    torch.testing.assert_close(probe_logits(model, ROWS), reference, atol=1e-4, rtol=1e-4)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| top1 agreement | 1 |" in card and "| loss | 2.5 | 0.5 |" in card
    assert front_matter(tmp_path / "out")["library_name"] == "transformers"
    assert json.loads((tmp_path / "out" / "peftctl.json").read_text())["template"] == "chat"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_merged_model_is_copied_whole(finished, tmp_path):
    merge(finished[0].path, tmp_path / "merged", rows=ROWS)
    export(tmp_path / "merged", "hf", tmp_path / "out", merged=True)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "merged").iterdir())


def test_an_artefact_of_another_tool_keeps_its_card_and_loses_its_state(finished, tmp_path):
    adapter = shutil.copytree(finished[0].adapter, tmp_path / "adapter")
    (adapter / "peftctl.json").unlink()
    (adapter / "README.md").write_text("my card")
    for name in ("optimizer.pt", "rng_state_0.pth", "training_args.bin", ".secret"):
        (adapter / name).write_text("x")
    export(adapter, "hf", tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "my card"
    assert not {"optimizer.pt", "rng_state_0.pth", "training_args.bin", ".secret"} & set(os.listdir(tmp_path / "out"))


@pytest.mark.parametrize("merged", [False, True])
def test_what_is_made_for_others_names_no_directory_of_this_machine(run, tmp_path, merged):
    done = export(run[0].path, "hf", tmp_path / "out", merged=merged, rows=ROWS, repository="me/model")
    for file in (tmp_path / "out").iterdir():
        assert str(run[0].path.parent).encode() not in file.read_bytes(), file.name
    assert '.from_pretrained("me/model")' in (tmp_path / "out" / "README.md").read_text() or not merged
    assert any("a directory of this machine" in line for line in done.notices) == (not merged)


@pytest.mark.parametrize("format", ["gguf", "vllm"])
def test_formats_of_later_versions(finished, tmp_path, format):
    with pytest.raises(UsageError, match=f"--format {format}: not in this version"):
        export(finished[0].path, format, tmp_path / "out")


def test_refusals(finished, tmp_path):
    run, _ = finished
    with pytest.raises(UsageError, match="--format onnx: unknown; known: hf, ollama"):
        export(run.path, "onnx", tmp_path / "out")
    with pytest.raises(UsageError, match="has no directory to copy"):
        export("smollm2-135m", "hf", tmp_path / "out")
    with pytest.raises(UsageError, match="exists already"):
        export(run.path, "hf", run.path)


def test_a_damaged_adapter_is_not_copied(finished, tmp_path):
    adapter = shutil.copytree(finished[0].adapter, tmp_path / "copy")
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="is damaged or cut off"):
        export(adapter, "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- vLLM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({}, None),
        ({"r": 16}, None),
        ({"r": 17}, "--max-lora-rank 32"),
        ({"r": 8, "rank_pattern": {"q_proj": 64}}, "differ by layer"),
        ({"r": 600}, "a rank above 512"),
        ({"use_dora": True, "modules_to_save": ["lm_head"]}, "modules_to_save and DoRA"),
        ({"bias": "all"}, "trained biases"),
        ({"trainable_token_indices": {"embed_tokens": [5]}}, "rows of new tokens"),
        ({"peft_type": "IA3"}, "serves LoRA adapters only, not IA3"),
    ],
)
def test_what_vllm_would_refuse(config, part):
    lines = vllm_notices({"peft_type": "LORA", "r": 8, "bias": "none"} | config)
    assert len(lines) == (part is not None) and all(part in line for line in lines)


def test_the_notice_stands_in_the_result(tmp_path):
    run, _ = lora_run(tmp_path, modules_to_save=["lm_head"], target_modules=["q_proj"], tie=False)
    assert "vLLM refuses adapters with modules_to_save" in export(run.path, "hf", tmp_path / "out").notices[0]


# -- Ollama ----------------------------------------------------------------------------------------------------------


def test_an_adapter_becomes_a_merged_model_with_a_modelfile(run, tmp_path):
    done = export(run[0].path, "ollama", tmp_path / "out", rows=ROWS)
    assert (done.content, done.template) == ("model", "chatml")
    model, _ = load(tmp_path / "out" / "model")
    torch.testing.assert_close(probe_logits(model, ROWS), run[1], atol=1e-4, rtol=1e-4)
    text = (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    assert "\nFROM ./model\nTEMPLATE" in text and "PARAMETER num_ctx 512\n" in text and "apache-2.0" in text
    settings = json.loads((tmp_path / "out" / "model" / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is False
    assert any("may split this tokenizer's text differently" in line for line in done.notices)


def test_an_adapter_beside_its_base(run, tmp_path):
    done = export(run[0].path, "ollama", tmp_path / "out", merged=False)
    assert done.content == "adapter"
    assert "FROM ./model\nADAPTER ./adapter\n" in (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    base, _ = load(tmp_path / "out" / "model")
    plain, _ = load(run[0].path.parent / "base")
    assert torch.equal(probe_logits(base, ROWS), probe_logits(plain, ROWS))
    own = (run[0].adapter / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").read_bytes() == own


def test_a_whole_model_is_exported_as_it_is(tmp_path):
    save_tiny(tmp_path / "model")
    assert export(tmp_path / "model", "ollama", tmp_path / "out").content == "model"
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == weights


def test_the_template_of_the_run_is_what_counts(run, tmp_path):
    adapter = shutil.copytree(run[0].adapter, tmp_path / "adapter")
    record = json.loads((adapter / "peftctl.json").read_text()) | {"template": "alpaca"}
    (adapter / "peftctl.json").write_text(json.dumps(record))
    done = export(adapter, "ollama", tmp_path / "out", merged=False)
    assert done.template == "plain"
    assert "### Instruction:\n{{ .Content }}" in (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    # Once merged, the folder itself must say so, whatever it is exported to next.
    export(adapter, "hf", tmp_path / "merged", merged=True, rows=ROWS)
    assert export(tmp_path / "merged", "ollama", tmp_path / "again").template == "plain"


@pytest.mark.parametrize("config", [{"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_that_ollama_can_not_take_beside_its_base(tmp_path, config):
    run, _ = lora_run(tmp_path, target_modules=["q_proj"], tie=False, **config)
    with pytest.raises(UsageError, match=r"Ollama can't take .* beside its base; leave out --no-merged"):
        export(run.path, "ollama", tmp_path / "out", merged=False)
    assert not (tmp_path / "out").exists()


def test_an_architecture_that_ollama_does_not_import(tmp_path):
    save_tiny(tmp_path / "opt", tiny_opt())
    with pytest.raises(UsageError, match="Ollama imports no safetensors of OPTForCausalLM"):
        export(tmp_path / "opt", "ollama", tmp_path / "out")


def test_an_unknown_template_is_refused_and_nothing_is_left(tmp_path):
    save_tiny(tmp_path / "model", template=CHATML.replace("<|im_end|>", "<|end|>"))
    with pytest.raises(UsageError, match="no known template"):
        export(tmp_path / "model", "ollama", tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_sentencepiece_tokenizer_needs_its_model(tmp_path):
    from tests.data import styles

    save_tiny(tmp_path / "model")
    styles.metaspace(styles.CHATML).save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match=r"from tokenizer\.model, and there is none"):
        export(tmp_path / "model", "ollama", tmp_path / "out")
    (tmp_path / "model" / "tokenizer.model").write_bytes(b"pieces")
    assert export(tmp_path / "model", "ollama", tmp_path / "out").notices == ()
    assert (tmp_path / "out" / "model" / "tokenizer.model").read_bytes() == b"pieces"
