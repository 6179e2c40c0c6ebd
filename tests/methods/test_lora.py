"""LoRA: the paper's equation in float64, its invariants, and its refusals."""

import math

import pytest
import torch
from peft.tuners.lora import LoraLayer

from peftctl.errors import UsageError
from peftctl.methods.lora import Config, Method
from tests.methods.helpers import applied, context, run_steps
from tests.tiny import tiny_llama, tiny_opt

QV = {"target_modules": ["q_proj", "v_proj"]}


def lora_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def randomise_b(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        b = layer.lora_B["default"].weight
        b.data = torch.randn(b.shape, generator=generator).to(b.dtype) * 0.1


@pytest.mark.parametrize("training", [True, False])
def test_layer_is_the_papers_equation_in_float64(training):
    """y = W x + (alpha / r) B A x, in our training forward and in peft's own."""
    model = applied(Method(Config(r=3, alpha=12, target_modules="all-linear")), tiny_llama().double())
    model = model.double().train(training)
    randomise_b(model)
    layer = model.base_model.model.model.layers[1].mlp.gate_proj
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    w, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    naive = torch.stack([torch.stack([w @ v + (12 / 3) * (b @ (a @ v)) for v in row]) for row in x])
    torch.testing.assert_close(layer(x), naive, rtol=1e-12, atol=1e-12)


def test_training_forward_has_pefts_gradients():
    """Our training layer and peft's stock layer give the same loss and the same gradients."""
    results = []
    for fast in (True, False):
        model = applied(Method(Config(r=4, target_modules="all-linear")), tiny_llama().double()).double().train()
        randomise_b(model)
        if not fast:
            for layer in lora_layers(model).values():
                layer._plain = lambda: False
        ids = torch.arange(1, 13).reshape(2, 6)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-10, atol=1e-12)


def test_training_forward_keeps_no_float32_copy_of_a_bfloat16_input():
    model = applied(Method(Config(r=4, target_modules="all-linear")), tiny_llama(dtype="bfloat16")).train()
    layer = next(iter(lora_layers(model).values()))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, 7, 32, dtype=torch.bfloat16, requires_grad=True))
    wide = [t for t in kept if t.dtype == torch.float32 and t.shape[-1] == 32 and t.numel() >= 2 * 7 * 32]
    assert kept and not wide


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt])
def test_starts_as_the_base_exactly(base):
    ids = torch.arange(1, 11).reshape(1, 10)
    reference = base()(input_ids=ids).logits
    model = applied(Method(Config(**QV)), base())
    for mode in (model.eval(), model.train()):
        assert torch.equal(mode(input_ids=ids).logits, reference)


def test_disabled_adapter_is_the_base_after_training():
    ids = torch.arange(1, 11).reshape(1, 10)
    reference = tiny_llama()(input_ids=ids).logits
    model = applied(Method(Config(**QV)), tiny_llama())
    run_steps(model, 3)
    model.eval()
    assert not torch.equal(model(input_ids=ids).logits, reference)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, reference)


@pytest.mark.parametrize(
    ("base", "targets"),
    [(tiny_llama, "all-linear"), (tiny_llama, ["q_proj", "v_proj"]), (tiny_llama, None), (tiny_opt, "all-linear")],
)
def test_trainable_count_is_the_closed_form(base, targets):
    method = Method(Config(r=5, target_modules=targets))
    expected = method.count(base())
    model = applied(method, base())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert expected == sum(5 * (m.in_features + m.out_features) for m in lora_layers(model).values())


def test_only_a_and_b_of_the_targets_train():
    model = applied(Method(Config(**QV)), tiny_llama())
    names = {n.split("base_model.model.")[1] for n, p in model.named_parameters() if p.requires_grad}
    expected = {
        f"model.layers.{i}.self_attn.{m}.lora_{f}.default.weight"
        for i in range(4)
        for m in ("q_proj", "v_proj")
        for f in "AB"
    }
    assert names == expected


def test_gradient_of_a_is_zero_at_first_and_not_after_a_step():
    model = applied(Method(Config(**QV)), tiny_llama()).train()
    ids = torch.arange(1, 13).reshape(2, 6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for first in (True, False):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        for layer in lora_layers(model).values():
            assert (layer.lora_A["default"].weight.grad.abs().max() == 0) == first
            assert layer.lora_B["default"].weight.grad.abs().max() > 0
        optimizer.step()


def test_frozen_weights_stay_bit_equal_and_trainable_ones_move():
    model = applied(Method(Config(**QV)), tiny_llama())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run_steps(model, 3, weight_decay=0.1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_merged_change_has_rank_r_and_scales_with_alpha():
    deltas = []
    for alpha in (4, 8):
        model = applied(Method(Config(r=2, alpha=alpha, **QV)), tiny_llama())
        randomise_b(model)
        layer = next(iter(lora_layers(model).values()))
        before = layer.base_layer.weight.detach().double().clone()
        model.merge_adapter()
        deltas.append(layer.base_layer.weight.detach().double() - before)
    assert torch.linalg.matrix_rank(deltas[0], tol=1e-4) == 2
    torch.testing.assert_close(deltas[1], 2 * deltas[0], rtol=1e-4, atol=1e-6)


def test_a_is_kaiming_uniform():
    model = applied(Method(Config(r=64, target_modules=["down_proj"])), tiny_llama())
    a = next(iter(lora_layers(model).values())).lora_A["default"].weight
    bound = 1 / math.sqrt(a.shape[1])
    assert a.abs().max() <= bound
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_dropout_acts_in_training_only():
    model = applied(Method(Config(dropout=0.5, **QV)), tiny_llama())
    randomise_b(model)
    ids = torch.arange(1, 11).reshape(1, 10)
    assert torch.equal(model.eval()(input_ids=ids).logits, model(input_ids=ids).logits)
    torch.manual_seed(0)
    first = model.train()(input_ids=ids).logits
    assert not torch.equal(first, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_porj"], r"'q_porj' matches no linear layer of the model; did you mean 'q_proj'\?"),
        (["q_proj", "c_attn"], "'c_attn' matches no linear layer"),
        (r".*\.qkv", r"matches no linear layer .* all-linear"),
        ("(", "is not a regular expression"),
    ],
)
def test_targets_that_match_nothing_are_refused(targets, message):
    with pytest.raises(UsageError, match=message):
        Method(Config(target_modules=targets)).apply(tiny_llama(), context())


def test_a_regular_expression_selects_whole_names():
    model = applied(Method(Config(target_modules=r"model\.layers\.[01]\.mlp\.up_proj")), tiny_llama())
    assert [n.split("base_model.model.")[1] for n in lora_layers(model)] == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
    ]
