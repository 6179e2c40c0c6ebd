"""Fixed factors: the layer's equation in float64, the one adapter that it becomes, and what a checkpoint holds."""

import copy
import math

import pytest
import torch

from peftctl.methods.lora import Config, Method
from peftctl.tuners.fixed_factors import (
    FixedFactors,
    base_matrix,
    factors_state,
    into_one_adapter,
    layers,
    load_factors,
    restart,
    start_from,
)
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied
from tests.tiny import tiny_llama

IDS = torch.arange(1, 25).reshape(2, 12)


def lora(base=None, **keys):
    base = (tiny_llama() if base is None else base).double()
    return applied(Method(Config(**{"r": 3, "alpha": 12, "target_modules": "all-linear"} | keys)), base).double()


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _, layer in layers(model):
        for factor in (layer.lora_A, layer.lora_B):
            weight = factor["default"].weight
            weight.data = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype) / 8


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 8


def one_layer(model):
    return model.base_model.model.model.layers[1].mlp.gate_proj  # 32 -> 64


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("undoes_start", [False, True])
def test_a_layer_is_the_equation_in_float64(training, undoes_start):
    """y = W x + s B A x + s F E x, however the two products are written."""
    model = lora().train(training)
    randomise(model)
    layer = one_layer(model)
    e, f = drawn(3, 32), drawn(64, 3)
    layer.fixed_factors = FixedFactors(e, f, undoes_start)
    w, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = drawn(2, 5, 32)
    naive = torch.stack([torch.stack([w @ v + 4 * (b @ (a @ v)) + 4 * (f @ (e @ v)) for v in row]) for row in x])
    torch.testing.assert_close(layer(x), naive, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("undoes_start", [False, True])
def test_only_a_and_b_get_gradients_and_they_are_those_of_the_equation(undoes_start):
    model = lora().train()
    randomise(model)
    layer = one_layer(model)
    layer.fixed_factors = FixedFactors(drawn(3, 32), drawn(64, 3), undoes_start)
    x, upstream = drawn(7, 32).requires_grad_(), drawn(7, 64, seed=2)
    layer(x).backward(upstream)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(a.grad, 4 * b.T @ upstream.T @ x, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(b.grad, 4 * upstream.T @ x @ a.T, rtol=1e-11, atol=1e-12)
    whole = layer.base_layer.weight + 4 * b @ a + 4 * layer.fixed_factors.F @ layer.fixed_factors.E
    torch.testing.assert_close(x.grad, upstream @ whole, rtol=1e-11, atol=1e-12)
    assert all(p is a or p is b for p in layer.parameters() if p.requires_grad)


def test_dropout_does_not_touch_what_is_fixed():
    """Earlier cycles stand for weights: only the input of A is dropped."""
    model = lora(dropout=0.5).train()
    randomise(model)
    layer = one_layer(model)
    before = drawn(7, 32)
    layer.lora_B["default"].weight.data.zero_()
    layer.fixed_factors = FixedFactors(drawn(3, 32), drawn(64, 3))
    expected = before @ (layer.base_layer.weight + 4 * layer.fixed_factors.F @ layer.fixed_factors.E).T
    torch.testing.assert_close(layer(before), expected, rtol=1e-11, atol=1e-12)


def test_what_was_learned_since_the_start_survives_a_half_type():
    """A and A_0 round alike until they differ by a 256th; the difference rounds to a 256th of itself."""
    model = applied(Method(Config(r=4, target_modules=["up_proj"])), tiny_llama(dtype="bfloat16")).train()
    _, layer = next(layers(model))
    a, b = drawn(4, 32).float(), drawn(64, 4).float()
    start_from(layer, a, b)
    step = drawn(4, 32, seed=9).float() * 2**-12
    layer.lora_A["default"].weight.data += step
    x = drawn(7, 32).to(torch.bfloat16)
    base = layer.base_layer(x)
    layer.base_layer.weight.data.zero_()
    learned = layer(x).float()
    expected = 4 * (x.float() @ step.T @ b.T)
    assert not torch.equal(base, torch.zeros_like(base))
    assert torch.nn.functional.cosine_similarity(learned.flatten(), expected.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_start_that_is_undone_leaves_the_base_exactly(architecture, dtype):
    still = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if architecture == "gpt2" else {}
    base = tiny_of(architecture, "cpu", **still).to(getattr(torch, dtype))
    reference = base(IDS).logits
    model = applied(Method(Config(r=4, target_modules="all-linear")), base)
    for _, layer in layers(model):
        w = base_matrix(layer)
        start_from(layer, w[:4].clone(), w[:, :4].clone())
    for mode in (model.eval(), model.train()):
        assert torch.equal(mode(IDS).logits, reference)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_matrix_of_a_base_maps_its_input(architecture):
    model = lora(tiny_of(architecture, "cpu"))
    for _, layer in layers(model):
        w = base_matrix(layer).double()
        d_out, d_in = w.shape
        assert (d_in, d_out) == (layer.in_features, layer.out_features)
        x = drawn(3, d_in)
        bias = layer.base_layer.bias
        plain = layer.base_layer(x) - (0 if bias is None else bias)
        torch.testing.assert_close(x @ w.T, plain, rtol=1e-6, atol=1e-6)


def test_a_restart_keeps_the_function_and_begins_anew():
    model = lora().eval()
    randomise(model)
    first = {name: layer.lora_A["default"].weight.detach().clone() for name, layer in layers(model)}
    for cycle in (1, 2):
        reference = model(IDS).logits
        generator = torch.Generator().manual_seed(cycle)
        for name, layer in layers(model):
            held = restart(layer, generator)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            assert {id(p) for p in held} == {id(a), id(b)}
            assert not b.any() and b.requires_grad and a.requires_grad
            assert not torch.equal(a, first[name])
            bound = 1 / math.sqrt(a.shape[1])
            assert 0.8 * bound < a.abs().max() <= bound
            assert layer.fixed_factors.E.shape[0] == 3 * cycle
        torch.testing.assert_close(model(IDS).logits, reference, rtol=0, atol=1e-12)
        randomise(model, seed=cycle)


def test_a_restart_draws_the_same_whatever_was_drawn_elsewhere():
    drawings = []
    for noise in (0, 1):
        model = lora()
        torch.manual_seed(noise)
        generator = torch.Generator().manual_seed(7)
        for _, layer in layers(model):
            restart(layer, generator)
        drawings.append([layer.lora_A["default"].weight.detach() for _, layer in layers(model)])
    assert all(torch.equal(a, b) for a, b in zip(*drawings, strict=True))
    assert not torch.equal(drawings[0][0], drawings[0][3])


@pytest.mark.parametrize("keys", [{}, {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"up_proj": 7}}])
@pytest.mark.parametrize("cycles", [0, 1, 3])
def test_one_adapter_has_the_sum_as_plain_factors(cycles, keys):
    model = lora(**keys).eval()
    randomise(model)
    for cycle in range(cycles):
        generator = torch.Generator().manual_seed(cycle)
        for _, layer in layers(model):
            restart(layer, generator)
        randomise(model, seed=cycle + 1)
    logits = model(IDS).logits
    ranks = {name: layer.r["default"] for name, layer in layers(model)}
    scales = {name: layer.scaling["default"] for name, layer in layers(model)}
    one = into_one_adapter(model)
    torch.testing.assert_close(one(IDS).logits, logits, rtol=0, atol=1e-11)
    config = one.peft_config["default"]
    assert (config.r, config.lora_alpha) == (3 * (cycles + 1), 12 * (cycles + 1))
    for name, layer in layers(one):
        assert layer.fixed_factors is None and layer.scaling["default"] == scales[name]
        assert layer.r["default"] == len(layer.lora_A["default"].weight) == ranks[name] * (cycles + 1)
    merged = one.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_settings_of_the_one_adapter_give_its_scale(rslora):
    """What plain peft computes from r and alpha is the scale that was trained with."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=3, lora_alpha=12, use_rslora=rslora, target_modules=["q_proj"]))
    trained = applied(Method(Config(r=3, alpha=12, target_modules=["q_proj"])), tiny_llama())
    trained.peft_config["default"].use_rslora = rslora
    scale = next(m.scaling["default"] for n, m in model.named_modules() if n.endswith("q_proj"))
    for _, layer in layers(trained):
        layer.scaling["default"] = scale
        restart(layer, torch.Generator())
    settings = into_one_adapter(trained).peft_config["default"]
    assert settings.r == 6
    assert settings.lora_alpha / (math.sqrt(6) if rslora else 6) == pytest.approx(scale, rel=1e-12)


def test_layers_that_differ_in_their_multiples_are_refused():
    model = lora()
    _, layer = next(layers(model))
    restart(layer, torch.Generator())
    with pytest.raises(ValueError, match="the ranks of the layers grow by different factors: 1, 2"):
        into_one_adapter(model)


@pytest.mark.parametrize("undone", [False, True])
def test_a_checkpoint_gives_back_what_was_there_also_to_a_model_that_went_on(undone, tmp_path):
    model = lora().eval()
    randomise(model)
    for _, layer in layers(model):
        if undone:
            start_from(layer, layer.lora_A["default"].weight.clone(), layer.lora_B["default"].weight.clone())
        else:
            restart(layer, torch.Generator().manual_seed(0))
    torch.save(factors_state(model), tmp_path / "state.pt")
    trained = {n: p.detach().clone() for n, p in model.named_parameters()}
    logits = model(IDS).logits
    on = copy.deepcopy(model)
    for _, layer in layers(on):
        restart(layer, torch.Generator().manual_seed(1))
    randomise(on, seed=3)
    load_factors(on, torch.load(tmp_path / "state.pt", weights_only=True))
    for name, parameter in on.named_parameters():
        parameter.data.copy_(trained[name])
    torch.testing.assert_close(on(IDS).logits, logits, rtol=0, atol=1e-12)


def test_a_checkpoint_from_before_the_first_restart_takes_factors_away():
    model = lora()
    state = factors_state(model)
    assert state == {}
    for _, layer in layers(model):
        restart(layer, torch.Generator())
    load_factors(model, state)
    assert all(layer.fixed_factors is None for _, layer in layers(model))


def test_disabled_layers_are_the_base_exactly():
    reference = tiny_llama()(IDS).logits
    model = applied(Method(Config(r=3, target_modules="all-linear")), tiny_llama()).eval()
    randomise(model)
    for _, layer in layers(model):
        restart(layer, torch.Generator())
    assert not torch.equal(model(IDS).logits, reference)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, reference)
