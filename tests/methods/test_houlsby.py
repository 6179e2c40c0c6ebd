"""Adapter tuning: its equation in float64, where adapters stand, what trains, and what is saved."""

import json
import subprocess
import sys

import pytest
import torch

import peftctl.tuners  # noqa: F401  # peft learns the type
from peftctl.artifacts.load import load
from peftctl.errors import Interrupted, UsageError
from peftctl.methods import _targets
from peftctl.methods.houlsby import Config, Method
from peftctl.models.anatomy import sublayer_ends
from peftctl.models.load import load_model
from peftctl.recipe.schema import ModelSection, QuantizationSection
from peftctl.tuners.bottleneck import BottleneckLayer
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, recipe, run_steps
from tests.tiny import save_tiny, tiny_bart, tiny_llama, tiny_opt, tiny_t5
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

IDS = torch.arange(1, 25).reshape(2, 12)
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip


def method(**keys):
    return Method(Config(**{"bottleneck": 6, **keys}))


def layers(model):
    return {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, BottleneckLayer)}


def randomise(model, seed=0, std=0.3):
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model).values():
        for p in layer.bottleneck_adapter.parameters():
            p.data = (std * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)


def logits(model, ids=IDS):
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


# -- the equation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_layer_is_the_papers_equation_in_float64(activation):
    model = applied(method(activation=activation), tiny_opt().double()).double()
    randomise(model)
    layer = layers(model)["model.decoder.layers.1.fc2"]
    w, b = layer.base_layer.weight, layer.base_layer.bias
    down, up = layer.bottleneck_adapter["default"].down, layer.bottleneck_adapter["default"].up
    phi = {
        "gelu": lambda v: v * 0.5 * (1 + torch.erf(v / 2**0.5)),
        "relu": lambda v: v * (v > 0),
        "silu": lambda v: v / (1 + torch.exp(-v)),
    }[activation]
    x = torch.randn(2, 5, 64, dtype=torch.float64)
    for row, got in zip(x.flatten(0, 1), layer(x).flatten(0, 1), strict=True):
        h = w @ row + b
        expected = h + up.weight @ phi(down.weight @ h + down.bias) + up.bias
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_adapter_sees_one_position_at_a_time():
    model = applied(method(), tiny_llama())
    randomise(model)
    layer = layers(model)["model.layers.0.mlp.down_proj"]
    x, order = torch.randn(1, 9, 64), torch.randperm(9)
    torch.testing.assert_close(layer(x)[:, order], layer(x[:, order]))


def test_its_change_has_a_jacobian_of_rank_m():
    model = applied(method(bottleneck=3), tiny_llama().double()).double()
    randomise(model)
    layer = layers(model)["model.layers.0.mlp.down_proj"]
    jacobian = torch.autograd.functional.jacobian(
        lambda h: layer.bottleneck_adapter["default"](h), torch.randn(32).double()
    )
    singular = torch.linalg.svdvals(jacobian)
    assert singular[2] > 1e-6 and singular[3] < 1e-12


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, tiny_t5, tiny_bart])
def test_starts_as_the_base_exactly(base):
    reference = logits(base())
    model = applied(method(), base())
    for mode in (model.eval(), model.train()):
        assert torch.equal(logits(mode), reference)


def test_a_start_as_in_the_authors_code_is_near_the_base():
    model = applied(method(), tiny_llama())
    for layer in layers(model).values():
        torch.nn.init.trunc_normal_(layer.bottleneck_adapter["default"].up.weight, std=1e-3, a=-2e-3, b=2e-3)
    assert 0 < (logits(model) - logits(tiny_llama())).abs().max() < 1e-2


def test_the_down_projection_is_drawn_as_the_section_says():
    model = applied(method(bottleneck=200, init_std=0.02), tiny_llama())
    drawn = torch.cat([layer.bottleneck_adapter["default"].down.weight.flatten() for layer in layers(model).values()])
    assert drawn.abs().max() <= 0.04
    assert drawn.std().item() == pytest.approx(0.02 * 0.8796, rel=0.02)  # of a normal cut off at two deviations
    assert not any(layer.bottleneck_adapter["default"].down.bias.any() for layer in layers(model).values())


# -- where adapters stand, and what trains --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "ends"),
    [
        ("llama", {"self_attn.o_proj", "mlp.down_proj"}),
        ("qwen2", {"self_attn.o_proj", "mlp.down_proj"}),
        ("gemma2", {"self_attn.o_proj", "mlp.down_proj"}),
        ("phi3", {"self_attn.o_proj", "mlp.down_proj"}),
        ("glm4", {"self_attn.o_proj", "mlp.down_proj"}),
        ("gpt2", {"attn.c_proj", "mlp.c_proj"}),
        ("gpt_bigcode", {"attn.c_proj", "mlp.c_proj"}),
        ("gpt_neox", {"attention.dense", "mlp.dense_4h_to_h"}),
        ("bloom", {"self_attention.dense", "mlp.dense_4h_to_h"}),
        ("falcon", {"self_attention.dense", "mlp.dense_4h_to_h"}),
        ("mpt", {"attn.out_proj", "ffn.down_proj"}),
        ("opt", {"self_attn.out_proj", "fc2"}),
        ("bert", {"attention.output.dense", "output.dense"}),
    ],
)
def test_two_adapters_in_every_block_behind_its_sublayers(architecture, ends):
    model = tiny_of(architecture)
    found = sublayer_ends(model, _targets.matched_modules(model, "all-linear"))
    names = [*found["attention"], *found["mlp"]]
    inside = [name.split(f".{i}.", 1)[1] for i in range(2) for name in names if f".{i}." in name]
    assert sorted(inside) == sorted([*ends, *ends])
    assert len(found["attention"]) == len(found["mlp"]) == 2


def test_a_decoder_with_cross_attention_has_three_in_a_block():
    model = applied(method(), tiny_t5())
    found = [name.rsplit(".", 2)[-2] + "." + name.rsplit(".", 1)[-1] for name in layers(model)]
    assert {n: found.count(n) for n in found} == {"SelfAttention.o": 4, "EncDecAttention.o": 2, "DenseReluDense.wo": 4}


@pytest.mark.parametrize("architecture", ["mixtral", "mamba"])
def test_an_unknown_structure_is_an_error_that_says_what_to_name(architecture):
    with pytest.raises(UsageError, match=rf"{architecture} architecture .* give method.target_modules: .*, among "):
        method().count(tiny_of(architecture))


def test_named_targets_take_adapters_instead():
    model = applied(method(target_modules=["fc1"]), tiny_opt())
    assert set(layers(model)) == {f"model.decoder.layers.{i}.fc1" for i in range(2)}
    assert layers(model)["model.decoder.layers.0.fc1"].bottleneck_adapter["default"].up.out_features == 64


def test_an_embedding_is_refused():
    with pytest.raises(UsageError, match=r"model\.embed_tokens is an embedding; houlsby takes linear layers only"):
        method(target_modules=["embed_tokens"]).count(tiny_llama())


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, tiny_t5, tiny_bart])
def test_trainable_count_is_the_closed_form(base, norms):
    chosen = method(train_norms=norms)
    blocks, crossed, norm_parameters = {
        "tiny_llama": (4, 0, 9 * 32),
        "tiny_opt": (2, 0, 5 * 64),
        "tiny_t5": (4, 2, 12 * 32),
        "tiny_bart": (4, 2, 12 * 64),
    }[base.__name__]
    expected = (2 * blocks + crossed) * (2 * 32 * 6 + 6 + 32) + norms * norm_parameters
    assert chosen.count(base()) == expected
    model = applied(chosen, base())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_count_on_smollm2_is_the_papers_formula_and_its_norms_come_on_top():
    model = tiny_of("llama", **SMOLLM2)
    assert Method(Config(train_norms=False)).count(model) == 30 * 2 * (2 * 576 * 64 + 64 + 576) == 4_462_080
    assert Method(Config()).count(model) == 4_462_080 + 61 * 576


def test_only_adapters_and_norms_train():
    model = applied(method(), tiny_llama())
    names = {n.split("base_model.model.")[1] for n, p in model.named_parameters() if p.requires_grad}
    parts = [f"bottleneck_adapter.default.{part}.{kind}" for part in ("down", "up") for kind in ("weight", "bias")]
    ends = [f"model.layers.{i}.{end}" for i in range(4) for end in ("self_attn.o_proj", "mlp.down_proj")]
    norms = [f"model.layers.{i}.{n}_layernorm" for i in range(4) for n in ("input", "post_attention")] + ["model.norm"]
    adapters = {f"{end}.{part}" for end in ends for part in parts}
    assert names == adapters | {f"{norm}.modules_to_save.default.weight" for norm in norms}


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt])
def test_three_steps_move_adapters_and_norms_and_nothing_else(base):
    model = applied(method(), base())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = run_steps(model, 3, weight_decay=0.1)
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


@pytest.mark.parametrize("norms", [True, False])
def test_disabled_it_is_the_base_with_the_bases_norms(norms):
    reference = logits(tiny_llama())
    model = applied(method(train_norms=norms), tiny_llama())
    run_steps(model, 3)
    model.eval()
    assert not torch.equal(logits(model), reference)
    with model.disable_adapter():
        assert torch.equal(logits(model), reference)
    # What peft leaves when it unloads has the trained norms: it keeps every module that trained whole.
    assert torch.equal(logits(model.unload()), reference) != norms


def test_merging_is_refused_with_a_reason():
    model = applied(method(), tiny_llama())
    with pytest.raises(NotImplementedError, match="not linear: no weight of the base can take it up"):
        model.merge_and_unload()
    assert not Method.card.mergeable and "not linear" in Method.card.merge_note


def test_stopped_and_resumed_equals_straight(tmp_path):
    straight, _ = train(workload(tmp_path / "a", method(), max_steps=8))
    with pytest.raises(Interrupted):
        train(workload(tmp_path / "b", method(), max_steps=8, reporter=StopAt(5)))
    work = workload(tmp_path / "b", method(), max_steps=8)
    again, _ = train(work, work.run.latest_checkpoint())
    for name, tensor in trained_tensors(straight).items():
        assert torch.equal(trained_tensors(again)[name], tensor), name


def test_in_a_half_type_what_trains_is_float32_and_the_stream_is_not():
    model = applied(method(), tiny_llama(dtype="bfloat16"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    seen = []
    for layer in layers(model).values():
        layer.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    losses = run_steps(model, 4, lr=1e-2)
    assert losses[-1] < losses[0]
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}


@pytest.mark.parametrize("kind", [{"bits": 4}, {"bits": 8}], ids=["nf4", "int8"])
def test_it_trains_over_a_quantised_base(tmp_path, kind):
    section = ModelSection(name_or_path=str(save_tiny(tmp_path)), dtype="float32")
    base = load_model(section, device="cpu", quantization=QuantizationSection(**kind))
    reference = logits(base)
    chosen = method()
    expected = chosen.count(base)
    model = applied(chosen, base)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert torch.equal(logits(model.eval()), reference)
    losses = run_steps(model, 4)
    assert losses[-1] < losses[0]
    with model.eval().disable_adapter():
        assert torch.equal(logits(model), reference)


# -- the artefact ---------------------------------------------------------------------------------------------------

PLAIN = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
try:
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
except KeyError as error:
    print(error)
import peftctl.tuners
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(1, 25).reshape(2, 12)).logits, out)
"""


def saved(folder):
    base = save_tiny(folder / "base")
    chosen = method(bottleneck=5)
    model = applied(chosen, tiny_llama())
    randomise(model)
    run_steps(model, 2)
    exported = chosen.export(model).eval()
    exported.save_pretrained(folder / "adapter")
    return base, folder / "adapter", logits(exported)


def test_in_another_process_one_import_makes_plain_peft_load_it(tmp_path):
    from safetensors.torch import load_file

    base, adapter, reference = saved(tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["bottleneck"], config["activation"]) == ("PEFTCTL_BOTTLENECK", 5, "gelu")
    keys = {key.removeprefix("base_model.model.") for key in load_file(adapter / "adapter_model.safetensors")}
    assert "model.layers.0.mlp.down_proj.bottleneck_adapter.up.weight" in keys and "model.norm.weight" in keys
    assert len(keys) == 8 * 4 + 9
    arguments = [str(base), str(adapter), str(tmp_path / "logits.pt")]
    done = subprocess.run([sys.executable, "-c", PLAIN, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "'PEFTCTL_BOTTLENECK'"  # what the card warns of
    assert torch.equal(torch.load(tmp_path / "logits.pt"), reference)


def test_peftctl_loads_it_and_a_second_one_beside_it(tmp_path):
    base, adapter, reference = saved(tmp_path)
    path = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(path | {"base_model_name_or_path": str(base)}))
    model, _ = load(str(adapter))
    assert torch.equal(logits(model), reference)
    model.load_adapter(str(adapter), "other")
    model.set_adapter("other")
    assert torch.equal(logits(model), reference)


def test_a_half_type_adapter_reloads_as_it_answered(tmp_path):
    from peft import PeftModel

    chosen = method()
    model = applied(chosen, tiny_llama(dtype="bfloat16"))
    run_steps(model, 3, lr=0.05)
    exported = chosen.export(model).eval()
    exported.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(dtype="bfloat16"), tmp_path).eval()
    assert torch.equal(logits(again), logits(exported))
    assert not torch.equal(logits(again), logits(tiny_llama(dtype="bfloat16")))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bottleneck": 0}, "greater than or equal to 1|greater than 0"),
        ({"activation": "tanh"}, "'gelu', 'relu' or 'silu'"),
        ({"init_std": 0}, "greater than 0"),
    ],
)
def test_sections_that_can_not_work_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        recipe(Config(**keys))
