import json
import subprocess
import sys
import textwrap

import pytest
import torch
import yaml
from safetensors.torch import load_file

from peftctl.artifacts.checks import probe_logits
from peftctl.artifacts.dtypes import cast_weights
from peftctl.artifacts.load import load
from peftctl.artifacts.rundir import RunDir
from peftctl.artifacts.save import save_artifact
from peftctl.errors import ArtifactError
from peftctl.methods.lora import Config
from peftctl.models.fingerprint import weights_fingerprint
from peftctl.models.load import load_model, load_tokenizer
from tests.artifacts.helpers import ROWS, lora_run, make_info, make_recipe, random_lora
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_the_exact_files_and_keys_of_an_adapter(finished):
    run, _ = finished
    assert names(run.adapter) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "peftctl.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert names(run.path) == ["adapter", "recipe.yaml"]
    modules = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    assert set(load_file(run.adapter / "adapter_model.safetensors")) == {
        f"base_model.model.model.layers.{i}.{module}.lora_{ab}.weight"
        for i in range(4) for module in modules for ab in "AB"
    }  # fmt: skip


def test_what_an_adapter_says_about_itself(finished):
    run, _ = finished
    base = str(run.path.parent / "base")
    fingerprint = weights_fingerprint(tiny_llama())
    content = json.loads((run.adapter / "peftctl.json").read_text())
    assert len(content.pop("template_hash")) == 64
    assert content == {
        "format": 1,
        "method": "lora",
        "config": Config(r=4, alpha=8).model_dump(mode="json"),
        "base": {"name": base, "revision": None, "fingerprint": fingerprint, "dtype": "float32", "quantization": None},
        "task": "causal_lm",
        "template": "chat",
        "config_changes": {},
        "tasks": [],
    }
    assert json.loads((run.adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == base


def test_the_model_card(finished):
    run, _ = finished
    _, front, body = (run.adapter / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "peft", "base_model": "base", "tags": ["peftctl", "lora"]}
    for said in ("LoRA (Hu et al. 2021, arXiv 2106.09685)", "| steps | 3 |", "| train loss | 1.25 |", "feed" * 16):
        assert said in body
    assert "import peftctl" not in body


def in_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_card_s_own_code_loads_it_in_a_process_without_peftctl(finished, tmp_path):
    run, reference = finished
    card = (run.adapter / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("DIRECTORY", str(run.adapter))
    out = tmp_path / "logits.pt"
    code += f"""
import sys, torch
assert "peftctl" not in sys.modules
model.eval()
with torch.inference_mode():
    pieces = [model(input_ids=torch.tensor([row])).logits[0] for row in {ROWS}]
torch.save(torch.cat(pieces), {str(out)!r})
print(tokenizer.apply_chat_template([dict(role="user", content="hi")], tokenize=False))
"""
    printed = in_fresh_process(code)
    assert "<|im_start|>user\nhi<|im_end|>" in printed
    torch.testing.assert_close(torch.load(out), reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_reloads_exactly(tmp_path, dtype):
    run, reference = lora_run(tmp_path, dtype=dtype)
    model, tokenizer = load(run.path)
    assert model.dtype is getattr(torch, dtype)
    assert not model.training
    torch.testing.assert_close(probe_logits(model, ROWS), reference, atol=0, rtol=0)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


def test_an_embedding_target_does_not_copy_the_base(tmp_path):
    run, _ = lora_run(tmp_path, target_modules=["embed_tokens"])
    assert set(load_file(run.adapter / "adapter_model.safetensors")) == {
        f"base_model.model.model.embed_tokens.lora_embedding_{ab}" for ab in "AB"
    }


def test_a_run_of_last_layers_reloads(tmp_path):
    from peftctl.methods.base import Context
    from peftctl.methods.last_layers import Config, Method

    base = save_tiny(tmp_path / "base", tiny_llama(dtype="bfloat16"))
    recipe = make_recipe(base, tmp_path / "run", dtype="bfloat16", method=Config(layers=1))
    plain = load_model(recipe.model)
    info = make_info(recipe, plain)
    model = Method(recipe.method).apply(plain, Context(recipe))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.mul_(1.1)
    cast_weights(model.eval(), torch.bfloat16)
    reference = probe_logits(model, ROWS)
    run = RunDir(tmp_path / "run")
    save_artifact(model, load_tokenizer(recipe.model), run, info)
    loaded, _ = load(run.adapter)
    torch.testing.assert_close(probe_logits(loaded, ROWS), reference, atol=0, rtol=0)


@pytest.mark.parametrize("tie", [True, False])
def test_a_whole_model_keeps_its_tie_and_is_sharded(tmp_path, tie):
    from peftctl.methods.full import Config

    model = tiny_llama(seed=5, tie=tie)
    model.generation_config.max_new_tokens = 7
    recipe = make_recipe(save_tiny(tmp_path / "base"), tmp_path / "run", method=Config())
    run = RunDir(tmp_path / "run")
    folder = save_artifact(model, tiny_tokenizer(), run, make_info(recipe, tiny_llama()), max_shard_size="100KB")
    assert folder == run.model
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    stored = {name for shard in shards for name in load_file(shard)}
    assert ("lm_head.weight" in stored) is not tie
    assert json.loads((folder / "generation_config.json").read_text())["max_new_tokens"] == 7
    assert yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])["library_name"] == "transformers"
    loaded, _ = load(folder)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tie
    torch.testing.assert_close(probe_logits(loaded, ROWS), probe_logits(model, ROWS), atol=0, rtol=0)


def test_a_template_alone(tmp_path):
    from peftctl.methods.hard_prompt import Config

    recipe = make_recipe(save_tiny(tmp_path / "base"), tmp_path / "run", method=Config(shots=0))
    tokenizer = load_tokenizer(recipe.model)
    tokenizer.chat_template = "{{- 'shown ' -}}" + tokenizer.chat_template
    run = RunDir(tmp_path / "run")
    assert save_artifact(None, tokenizer, run, make_info(recipe, tiny_llama())) == run.adapter
    assert not list(run.adapter.glob("*.safetensors"))
    model, loaded = load(run.adapter)
    assert loaded.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False).startswith("shown ")
    torch.testing.assert_close(probe_logits(model, ROWS), probe_logits(tiny_llama(), ROWS), atol=0, rtol=0)


def test_a_type_that_is_not_stock_says_import_peftctl_first(finished, tmp_path):
    from peftctl.artifacts.model_card import render_card

    recipe = make_recipe("smollm2-135m", tmp_path)
    model = random_lora(tiny_llama(), target_modules=["q_proj"])
    info = make_info(recipe, tiny_llama(), train_loss=float("nan"))
    assert "import peftctl" not in render_card(model, info, {})
    model.peft_config["default"].peft_type = "PEFTCTL_ROUTED"
    card = render_card(model, info, {})
    assert "import peftctl.tuners  # first" in card
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card
    assert "nan" not in card


def test_a_broken_adapter_is_never_given_its_name(tmp_path):
    run, _ = lora_run(tmp_path)
    before = (run.adapter / "adapter_model.safetensors").read_bytes()
    recipe = make_recipe(tmp_path / "base", run.path)
    model = random_lora(load_model(recipe.model))
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ArtifactError, match=r"hold NaN or infinity: base_model.*layers.0.self_attn.q_proj.lora_B"):
        save_artifact(model, tiny_tokenizer(), run, make_info(recipe, tiny_llama()))
    assert names(run.path) == ["adapter", "recipe.yaml"]
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == before
