import json
import shutil
import subprocess
import sys

import pytest
import torch
from bitsandbytes import functional

import peftctl
from peftctl.artifacts.checks import probe_logits
from peftctl.artifacts.load import load
from peftctl.artifacts.merge import merge
from peftctl.commands.prepare import prepare
from peftctl.errors import ArtifactError, UsageError
from peftctl.methods.qlora import Config, Method
from peftctl.models.load import load_model
from peftctl.models.quantize import is_quantized
from peftctl.recipe.schema import ModelSection, QuantizationSection
from tests.commands.helpers import write_recipe
from tests.methods.helpers import applied, run_steps
from tests.tiny import save_tiny, tiny_llama

KINDS = {"nf4": {"bits": 4}, "fp4": {"bits": 4, "type": "fp4", "double_quant": False}, "int8": {"bits": 8}}
ROWS = [[5, 6, 7, 8, 9, 10], list(range(20, 60))]
IDS = torch.arange(5, 45).reshape(2, 20)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


def quantized(base, kind="nf4", dtype="float32"):
    section = ModelSection(name_or_path=str(base), dtype=dtype)
    return load_model(section, device="cpu", quantization=QuantizationSection(**KINDS[kind]))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_starts_as_the_quantised_base_before_and_after_an_evaluation(base, kind, dtype):
    plain = logits(quantized(base, kind, dtype))
    model = applied(Method(Config(r=4, dropout=0.3)), quantized(base, kind, dtype))
    model.eval()
    assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), plain)
    model.train()
    model(IDS).logits.float().square().mean().backward()
    model.eval()
    assert torch.equal(logits(model), plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_factors_move_and_not_a_byte_of_the_base(base, kind):
    model = applied(Method(Config(r=4)), quantized(base, kind))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = run_steps(model, 4, weight_decay=0.1)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert len(moved) == 2 * 4 * 7
    assert losses[-1] < losses[0]
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}


def test_a_layer_is_the_papers_equation_over_the_dequantised_weight(base):
    model = applied(Method(Config(r=4, alpha=8)), quantized(base))
    run_steps(model, 2)
    layer = model.base_model.model.model.layers[2].mlp.gate_proj
    packed = layer.base_layer.weight
    w = functional.dequantize_4bit(packed.data, packed.quant_state).double()
    a, b = (layer.get_submodule(n).default.weight.detach().double() for n in ("lora_A", "lora_B"))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ w.T + 8 / 4 * x.double() @ a.T @ b.T
    for training in (True, False):
        layer.train(training)
        torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)


def finished(folder, base, kind, dtype="float32"):
    recipe = write_recipe(
        folder, base, {"name": "qlora", "r": 4}, quantization={"double_quant": None} | KINDS[kind],
        model={"dtype": dtype}, train={"optimizer": "adamw"},
    )  # fmt: skip
    if kind == "int8":
        text = recipe.read_text().replace("name: qlora", "name: lora\n  target_modules: all-linear")
        recipe.write_text(text.replace("  double_quant: null\n", ""))
    return peftctl.train(peftctl.load_recipe(recipe))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_saves_an_adapter_that_is_read_back_on_the_quantised_base(tmp_path, base, kind, dtype):
    result = finished(tmp_path, base, kind, dtype)  # the run itself compares the logits read back with the trained
    assert result.summary["steps"] == 6
    assert result.summary["total_parameters"] == result.summary["trainable_parameters"] + sum(
        p.numel() for p in tiny_llama().parameters()
    )
    model, _ = load(result.run)
    assert is_quantized(model)
    record = json.loads((result.artefact / "peftctl.json").read_text())
    assert record["base"]["quantization"]["bits"] == KINDS[kind]["bits"]


def test_plain_peft_reads_the_adapter_in_a_process_of_its_own(tmp_path, base):
    result = finished(tmp_path, base, "nf4")
    model, _ = load(result.run)
    code = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
base = AutoModelForCausalLM.from_pretrained({str(base)!r}, quantization_config=config, dtype=torch.float32)
for module in base.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
model = PeftModel.from_pretrained(base, {str(result.artefact)!r}).eval()
assert not [name for name in sys.modules if name.startswith("peftctl")]
with torch.no_grad():
    torch.save(model(torch.tensor([{ROWS[1]}])).logits[0], {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, timeout=120)
    expected = probe_logits(model, ROWS[1:])
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_goes_into_the_original_weights_and_reports_the_drift(tmp_path, base, kind):
    result = finished(tmp_path, base, kind)
    merged = merge(result.run, tmp_path / "merged", rows=ROWS)
    adapted, _ = load(result.run)
    model, _ = load(tmp_path / "merged")
    assert not is_quantized(model)
    original = load_model(ModelSection(name_or_path=str(base), dtype="float32"))
    layer, name = adapted.base_model.model.model.layers[1].self_attn.q_proj, "model.layers.1.self_attn.q_proj.weight"
    a, b = (layer.get_submodule(n).default.weight.double() for n in ("lora_A", "lora_B"))
    expected = original.get_parameter(name).double() + layer.scaling["default"] * b @ a
    torch.testing.assert_close(model.get_parameter(name).double(), expected, atol=1e-6, rtol=0)
    assert merged.max_delta < 1e-3
    delta = (probe_logits(model, ROWS) - probe_logits(adapted, ROWS)).abs().max()
    assert merged.drift["max_delta"] == pytest.approx(float(delta), rel=1e-3)
    assert merged.drift["max_delta"] > 100 * merged.max_delta
    assert merged.drift["kl"] > 0
    assert json.loads((tmp_path / "merged/peftctl.json").read_text())["merged"]["drift"] == merged.drift


def test_merging_an_unquantised_run_has_no_drift(tmp_path, base):
    result = peftctl.train(peftctl.load_recipe(write_recipe(tmp_path, base)))
    assert merge(result.run, tmp_path / "merged").drift is None


def test_another_base_is_refused_by_its_files(tmp_path, base):
    result = finished(tmp_path, base, "nf4")
    other = save_tiny(tmp_path / "other", tiny_llama(seed=1))
    with pytest.raises(ArtifactError, match="adapter of another base"):
        merge(result.run, tmp_path / "merged", base=str(other))
    record = json.loads((result.artefact / "peftctl.json").read_text())
    record["base"]["name"] = str(other)
    (result.artefact / "peftctl.json").write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match="adapter of another base"):
        load(result.run)


def test_the_method_implies_nf4_and_a_paged_optimizer(tmp_path, base):
    recipe = peftctl.load_recipe(write_recipe(tmp_path, base, {"name": "qlora"}))
    assert recipe.quantization == QuantizationSection(bits=4, type="nf4", double_quant=True)
    assert recipe.train.optimizer == "paged_adamw_32bit"
    assert recipe.method.target_modules == "all-linear"


@pytest.mark.parametrize("method", ["full", "last_layers", "hard_prompt"])
@pytest.mark.parametrize("bits", [4, 8])
def test_methods_that_train_base_weights_are_refused(tmp_path, base, method, bits):
    recipe = peftctl.load_recipe(write_recipe(tmp_path, base), [f"quantization.bits={bits}"])
    method = peftctl.load_recipe(method).method
    with pytest.raises(UsageError, match=rf"quantization.bits: {method.name} can't train over a base of {bits} bits"):
        prepare(recipe.model_copy(update={"method": method}))


def test_resume_is_equal_to_going_straight_through(tmp_path, base):
    straight = finished(tmp_path, base, "nf4")
    run = tmp_path / "stopped"
    recipe = peftctl.load_recipe(
        straight.run / "recipe.yaml", [f"train.output_dir={run}", "train.save_steps=3", "train.save_total_limit=5"]
    )
    peftctl.train(recipe)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "checkpoint-6")
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["checkpoint-3"]
    peftctl.train(recipe, resume=True)
    name = "adapter_model.safetensors"
    assert (run / "adapter" / name).read_bytes() == (straight.artefact / name).read_bytes()
