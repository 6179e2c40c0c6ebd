"""DoRA: lengths and directions of rows, the constant norm, half types, and the training forward against peft's own."""

import json

import pytest
import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.integrations import dequantize_module_weight

import peftctl
from peftctl.commands.prepare import prepare
from peftctl.errors import UsageError
from peftctl.methods.dora import Config, Method
from tests.commands.helpers import write_recipe
from tests.methods import lora_family as family
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, context, run_steps
from tests.tiny import tiny_llama, tiny_opt

QV = {"target_modules": ["q_proj", "v_proj"]}
ALL = {"r": 4, "target_modules": "all-linear"}


def magnitude(layer):
    return layer.lora_magnitude_vector["default"].weight


def layers(model):
    return family.lora_layers(model)


# -- the equation and its gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("base", "name"), [(tiny_llama, "model.layers.1.mlp.down_proj"),
                                            (tiny_opt, "model.decoder.layers.1.fc1")])  # fmt: skip
def test_layer_is_the_papers_equation_in_float64(base, name, training):
    model = family.double(Method(Config(r=3, alpha=12, target_modules="all-linear")), base).train(training)
    layer = layers(model)[name]
    w, a, b = family.factors(layer)
    m, bias = magnitude(layer), layer.base_layer.bias
    x = torch.randn(2, 5, layer.in_features, dtype=torch.float64)
    v = w + (12 / 3) * b @ a
    rows = [m[i] * v[i] / sum(e**2 for e in v[i].tolist()) ** 0.5 for i in range(len(v))]
    naive = torch.stack([torch.stack([row @ vector for row in rows]) for vector in x.reshape(-1, layer.in_features)])
    naive = naive.reshape(2, 5, -1) + (0 if bias is None else bias)
    torch.testing.assert_close(layer(x), naive, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
def test_beside_conv1d_it_is_the_papers_equation_in_float64(training):
    """GPT-2 stores W as (d_in, d_out)."""
    model = family.double(Method(Config(r=3, target_modules=["c_fc"])), lambda: tiny_of("gpt2", "cpu"))
    layer = layers(model.train(training))["transformer.h.1.mlp.c_fc"]
    w, a, b = family.factors(layer)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    v = w.T + layer.scaling["default"] * b @ a
    naive = x @ (magnitude(layer)[:, None] * v / v.norm(dim=1, keepdim=True)).T + layer.base_layer.bias
    torch.testing.assert_close(layer(x), naive, rtol=1e-11, atol=1e-11)


def test_gradients_hold_the_norm_constant():
    model = family.double(Method(Config(r=3, **QV))).train()
    layer = next(iter(layers(model).values()))
    w, a, b = family.factors(layer)
    x = torch.randn(2, 5, 32, dtype=torch.float64)

    def naive(constant):
        leaves = [t.detach().clone().requires_grad_() for t in (a, b, magnitude(layer))]
        v = w + layer.scaling["default"] * leaves[1] @ leaves[0]
        norm = v.norm(dim=1)
        norm = norm.detach() if constant else norm
        return torch.autograd.grad((x @ ((leaves[2] / norm)[:, None] * v).T).sin().sum(), leaves)

    layer(x).sin().sum().backward()
    found = (a.grad, b.grad, magnitude(layer).grad)
    for gradient, constant in zip(found, naive(True), strict=True):
        torch.testing.assert_close(gradient, constant, rtol=1e-9, atol=1e-9)
    for gradient, full in zip(found[:2], naive(False)[:2], strict=True):
        assert (gradient - full).abs().max() > 0.01 * full.abs().max()


def test_training_forward_has_pefts_gradients():
    results = []
    for ours in (True, False):
        model = family.double(Method(Config(**ALL)), tiny_opt).train()
        if not ours:
            for layer in layers(model).values():
                layer._plain = lambda: False
        loss = model(input_ids=family.IDS, labels=family.IDS).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-9, atol=1e-11)


def test_dropout_reaches_a_only():
    """With B = 0 there is nothing to drop, whatever the magnitudes are."""
    model = applied(Method(Config(dropout=0.5, **QV)), tiny_llama().double()).double().train()
    layer = next(iter(layers(model).values()))
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    magnitude(layer).data *= 1.5
    plain = layer.base_layer(x)
    torch.testing.assert_close(layer(x), 1.5 * plain, rtol=1e-12, atol=1e-12)
    layer.lora_B["default"].weight.data.normal_()
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_magnitudes_alone_stretch_rows_and_turn_none():
    model = family.double(Method(Config(r=3, **QV)))
    layer = next(iter(layers(model).values()))
    x = torch.eye(32, dtype=torch.float64)
    before = layer(x).T
    factors = torch.rand(32, dtype=torch.float64) + 0.5
    magnitude(layer).data *= factors
    after = layer(x).T
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1) * factors, rtol=1e-10, atol=0)
    torch.testing.assert_close(torch.cosine_similarity(before, after, dim=1), torch.ones_like(factors))


# -- where it starts, also in half types -------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "dtype"), [(tiny_llama, "float32"), (tiny_llama, "bfloat16"), (tiny_opt, None)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_starts_as_the_base_exactly(base, dtype, dropout):
    """Plain peft rounds m to bfloat16, and starts 0.16 away from this base."""
    make = (lambda: base(dtype=dtype)) if dtype else base
    family.check_identity(Method(Config(dropout=dropout, **ALL)), make)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_magnitudes_start_as_the_norms_of_rows_in_float32(dtype):
    for layer in layers(applied(Method(Config(**ALL)), tiny_llama(dtype=dtype))).values():
        assert magnitude(layer).shape == (layer.out_features,)
        assert magnitude(layer).dtype == torch.float32
        norms = layer.base_layer.weight.double().norm(dim=1)
        torch.testing.assert_close(magnitude(layer).double(), norms, rtol=1e-6, atol=0)


def test_training_forward_answers_as_pefts_own_up_to_the_rounding_of_bfloat16():
    model = family.randomise(applied(Method(Config(**ALL)), tiny_llama(dtype="bfloat16")), std=0.05)
    for layer in layers(model).values():
        x = torch.randn(64, layer.in_features, dtype=torch.bfloat16)
        ours, theirs = layer.train()(x).detach(), layer.eval()(x).detach()
        largest = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-8 * largest)


def test_training_forward_keeps_no_float32_copy_of_a_bfloat16_activation():
    model = applied(Method(Config(r=4, target_modules="all-linear")), tiny_llama(dtype="bfloat16"))
    for layer in layers(model).values():
        kept = family.kept_for_backward(layer, batch=16, seq=16, dtype=torch.bfloat16)
        assert kept and not any(dtype == torch.float32 and len(shape) > 2 for shape, dtype in kept)
        layer._plain = lambda: False
        kept = family.kept_for_backward(layer, batch=16, seq=16, dtype=torch.bfloat16)
        assert any(dtype == torch.float32 and shape[:2] == (16, 16) for shape, dtype in kept)  # peft's own does


# -- what trains -------------------------------------------------------------------------------------------------------


def test_count_is_loras_and_d_out():
    assert Method(Config(r=8, target_modules="all-linear")).count(family.smollm2()) == 2_597_760
    keys = {"r": 5, "rank_pattern": {"v_proj": 3}, "modules_to_save": ["norm"], **QV}
    expected = 4 * (5 * 64 + 32 + 3 * 48 + 16) + 32
    method = Method(Config(**keys))
    assert method.count(tiny_llama()) == family.trainable_count(applied(method, tiny_llama())) == expected
    bare = tiny_llama().to("meta")
    bare.tie_weights()
    model = method.apply(bare, context())
    assert family.trainable_count(model) == expected
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_only_a_b_and_m_move():
    family.check_frozen_base(Method(Config(r=4, **QV)))


def test_rows_of_new_tokens_train_beside_it():
    method = Method(Config(r=2, **QV))
    method.new_token_ids = [398, 399]
    model = applied(method, tiny_llama())
    assert family.trainable_count(model) == method.count(tiny_llama()) == 4 * (2 * 112 + 48) + 2 * 32
    assert run_steps(model, 3)[-1] < run_steps(model, 1)[0] + 10


def test_encoder_decoders():
    family.check_encoder_decoder(Method(Config(r=4)))


def test_stopped_and_resumed_equals_straight(tmp_path):
    family.check_resume(tmp_path, lambda: Method(Config(r=4, dropout=0.1, **QV)))


def test_over_a_4_bit_base(tiny_dir):
    """It starts as the base, norms are those of the dequantised rows, and only A, B and m move."""
    method = Method(Config(r=4, **QV))
    family.check_identity(method, lambda: family.quantized(tiny_dir))
    model = applied(method, family.quantized(tiny_dir))
    layer = next(iter(layers(model).values()))
    w = dequantize_module_weight(layer.base_layer).float()
    torch.testing.assert_close(magnitude(layer).detach(), w.norm(dim=1), rtol=1e-6, atol=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = run_steps(model, 4, weight_decay=0.1)
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name} and len(moved) == 4 * 2 * 3
    _, a, b = family.factors(layer)
    v = w + layer.scaling["default"] * (b @ a)
    x = torch.randn(5, 32)
    naive = x @ (magnitude(layer)[:, None] * v / v.norm(dim=1, keepdim=True)).T
    for training in (True, False):
        torch.testing.assert_close(layer.train(training)(x), naive, rtol=1e-5, atol=1e-5)


# -- the artefact ------------------------------------------------------------------------------------------------------


def test_rows_of_the_merged_weight_are_as_long_as_m():
    """Also where m has become negative."""
    model = family.randomise(applied(Method(Config(r=4, **QV)), tiny_llama()), std=0.5)
    for layer in layers(model).values():
        magnitude(layer).data[::3] *= -1
    model.eval()
    before = model(input_ids=family.IDS).logits
    model.merge_adapter()
    for layer in layers(model).values():
        torch.testing.assert_close(layer.base_layer.weight.norm(dim=1), magnitude(layer).detach().abs())
    torch.testing.assert_close(model(input_ids=family.IDS).logits, before, rtol=0, atol=2e-5)


def test_plain_peft_reads_the_adapter(tmp_path):
    folder = family.check_saved(tmp_path, Method(Config(r=4, rank_pattern={"v_proj": 2}, **QV)))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["use_dora"]) == ("LORA", True)


def test_a_bfloat16_base_reads_it_back_exactly(tmp_path):
    from peft import PeftModel

    model = family.randomise(applied(Method(Config(**ALL)), tiny_llama(dtype="bfloat16"))).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(dtype="bfloat16"), tmp_path).eval()
    assert torch.equal(again(input_ids=family.IDS).logits, model(input_ids=family.IDS).logits)
    assert any(isinstance(m, DoraLinearLayer) for m in again.modules())


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_an_8_bit_base_is_refused(tmp_path, tiny_dir):
    """On a CPU peft's DoRA loses the scales of 8-bit weights when it takes their norms."""
    path = write_recipe(tmp_path, tiny_dir, {"name": "dora", **ALL}, quantization={"bits": 8})
    with pytest.raises(UsageError, match=r"^quantization.bits: dora can't train over a base of 8 bits"):
        prepare(peftctl.load_recipe(path))


def test_parts_are_refused():
    with pytest.raises(ValueError, match="m would change the other parts as well; remove it, or take lora"):
        Config(parts=["q"])


@pytest.mark.parametrize(
    ("base", "targets", "message"),
    [
        (tiny_llama, ["embed_tokens"], "model.embed_tokens is an embedding; dora takes linear layers only"),
        (
            lambda: tiny_of("gpt2", tie_word_embeddings=False),
            ["c_attn", "lm_head"],
            "dora can't mix Conv1D and Linear; leave out the output head",
        ),
    ],
)
def test_targets_that_have_no_rows_of_one_kind_are_refused(base, targets, message):
    with pytest.raises(UsageError, match=f"^method.target_modules: {message}"):
        Method(Config(target_modules=targets)).count(base())
