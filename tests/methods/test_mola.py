"""MoLA: experts by depth, top-k with gates that sum to 1, idle experts, the balancing loss."""

import json

import pytest
import torch
from pydantic import ValidationError

from peftctl.methods._routed import Routed
from peftctl.methods.mola import Config, Method, bands, switch_balance
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, context
from tests.methods.routed import batch, check_moves, check_quantised, check_resume, experts, observed, parts, randomise
from tests.tiny import tiny_llama, tiny_opt, tiny_t5
from tests.training.helpers import train, workload


def method(**keys):
    return Method(Config(**{"r": 2, "alpha": 4, **keys}))


def per_block(chosen, model):
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(model.config.num_hidden_layers)]
    return list(chosen.experts(model, names).values())


def routed(p, k=2, mask=None):
    """Return the routing of a layer for probabilities (batch, seq, E), with gates as MoLA has them."""
    values, chosen = p.topk(k, dim=-1)
    gates = torch.zeros_like(p).scatter(-1, chosen, values / values.sum(-1, keepdim=True))
    return Routed("layer", p, gates, torch.ones(p.shape[:2], dtype=p.dtype) if mask is None else mask)


# -- experts by depth ----------------------------------------------------------------------------------------------


def test_32_layers_have_160_experts_in_four_bands_of_eight():
    model = tiny_of("llama", num_hidden_layers=32)
    found = per_block(method(), model)
    assert found == [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8 and sum(found) == 160
    for allocation in ("middle_heavy", [5], [5, 5, 5, 5], [8, 6, 4, 2]):
        assert sum(per_block(method(allocation=allocation), model)) == 160
    assert per_block(method(allocation="middle_heavy"), model)[8:24] == [8] * 16


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (1, [2]),
        (2, [2, 6]),
        (3, [2, 4, 6]),
        (5, [2, 2, 4, 6, 8]),
        (6, [2, 2, 4, 6, 6, 8]),
        (30, [2] * 8 + [4] * 7 + [6] * 8 + [8] * 7),
    ],
)
def test_other_depths_follow_the_rule_of_the_docstring(layers, expected):
    model = tiny_of("llama", num_hidden_layers=layers)
    assert per_block(method(), model) == expected == [bands(Config())[4 * i // layers] for i in range(layers)]


def test_an_encoder_and_a_decoder_are_divided_each_on_its_own():
    chosen, model = method(allocation=[2, 3]), tiny_t5()
    found = {name: len(one.router) for name, one in experts(applied(chosen, model)).items()}
    assert {(name.split(".")[0], name.split(".")[2], e) for name, e in found.items()} == {
        ("encoder", "0", 2), ("encoder", "1", 3), ("decoder", "0", 2), ("decoder", "1", 3)
    }  # fmt: skip


def test_counts_differ_by_layer_as_the_allocation_says():
    sizes = [(32, 32)] * 2 + [(32, 16)] * 2 + [(32, 64)] * 2 + [(64, 32)]
    one = sum(2 * (d_in + d_out) + d_in for d_in, d_out in sizes)
    chosen = method()
    assert chosen.count(tiny_llama()) == (2 + 4 + 6 + 8) * one
    model = applied(chosen, tiny_llama())
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == 20 * one
    for i, number in enumerate([2, 4, 6, 8]):
        assert sum(size for name, size in trained.items() if f".layers.{i}." in name) == number * one
    assert chosen.notices(tiny_llama()) == ["experts from the first block on: 2 4 6 8"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"allocation": [4, 1]}, "expected at least k = 2 experts in every band, got 1"),
        ({"k": 3}, "expected at least k = 3 experts in every band, got 2"),
        ({"k": 1}, "greater than or equal to 2"),
        ({"allocation": []}, "at least 1 item"),
        ({"allocation": "triangle"}, "inverted_triangle"),
    ],
)
def test_what_no_router_can_choose_from_is_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        method(**keys)


# -- routing -------------------------------------------------------------------------------------------------------


def test_every_token_has_two_experts_whose_gates_sum_to_1():
    model = randomise(applied(method(), tiny_llama()))
    for layer in observed(model, batch()).values():
        assert ((layer.gates > 0).sum(-1) == 2).all()
        assert (layer.gates.sum(-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, tiny_t5])
def test_starts_as_the_base_exactly(base):
    model, inputs = applied(method(), base()), {"input_ids": torch.arange(1, 25).reshape(2, 12)}
    inputs |= {"decoder_input_ids": inputs["input_ids"]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base()(**inputs).logits)


def test_it_starts_kaiming_uniform():
    model = applied(method(r=8), tiny_llama())
    for one in experts(model).values():
        bound = one.router.shape[1] ** -0.5
        for drawn in (one.router, *(a for a, _ in one.pairs())):
            assert 0.8 * bound < drawn.abs().max() <= bound
        assert not any(b.any() for _, b in one.pairs())


def test_three_steps_move_experts_and_routers_and_nothing_else():
    check_moves(applied(method(allocation=[2]), tiny_llama()))


def test_an_expert_without_tokens_stands_still_in_a_run_with_weight_decay(tmp_path):
    model, _ = train(workload(tmp_path, method(allocation=[8]), max_steps=1, batch_size=1, weight_decay=0.1))
    start = experts(method(allocation=[8]).apply(tiny_llama(), context()))  # drawn as `train` draws
    still = 0
    for name, one in experts(model).items():
        assert not torch.equal(one.router, start[name].router)
        for (a, b), (a0, b0) in zip(one.pairs(), start[name].pairs(), strict=True):
            assert torch.equal(a, a0) == torch.equal(b, b0)
            still += torch.equal(b, b0)
    assert 0 < still < 28 * 6  # few tokens, eight experts: some are idle, and two at least are not


def test_stopped_and_resumed_equals_straight(tmp_path):
    check_resume(tmp_path, lambda: method(load_balance=0.01, dropout=0.1))


@pytest.mark.parametrize("bits", [4, 8])
def test_over_a_quantised_base(tmp_path, bits):
    check_quantised(tmp_path, method, bits)


# -- the balancing loss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
def test_it_is_1_where_all_is_even(k):
    tokens = torch.arange(12)
    p = torch.full((2, 6, 6), 1 / 6, dtype=torch.float64)
    gates = torch.zeros_like(p)
    for row, place in ((r, s) for r in range(2) for s in range(6)):  # every expert is chosen equally often
        gates[row, place, (place + torch.arange(k)) % 6] = 1 / k
    layer = Routed("layer", p, gates, torch.ones(2, 6).double())
    assert switch_balance(layer).item() == pytest.approx(1, abs=1e-12) and len(tokens) == 12


def test_it_is_the_equation_over_tokens_without_padding():
    p = torch.randn(3, 5, 4, dtype=torch.float64).softmax(-1)
    mask = torch.ones(3, 5).double()
    mask[1, 3:], mask[2, 1:] = 0, 0
    layer = routed(p, mask=mask)
    chosen, mean, count = torch.zeros(4).double(), torch.zeros(4).double(), 0
    for row, place in mask.nonzero().tolist():
        for e in p[row, place].topk(2).indices:
            chosen[e] += 1
        mean += p[row, place]
        count += 1
    f, mean = chosen / (2 * count), mean / count
    assert f.sum().item() == pytest.approx(1)
    assert switch_balance(layer).item() == pytest.approx(4 * float((f * mean).sum()), rel=1e-12)


def test_it_is_large_where_one_expert_has_everything_and_descent_evens_it_out():
    logits = torch.tensor([4.0, 0.0, 0.0, 0.0]).repeat(1, 6, 1).double().requires_grad_()
    before = switch_balance(routed(logits.softmax(-1), k=2))
    assert before > 1.5
    before.backward()
    assert logits.grad[..., 0].min() > 0  # descent lowers what all chose


def test_it_is_a_part_of_the_loss_where_it_is_on():
    off, on = method(), method(load_balance=0.01)
    model = randomise(applied(on, tiny_llama()))
    assert set(parts(off, model, batch())) == {"loss"}
    found = parts(on, model, batch(pad=4))
    expected = sum(switch_balance(layer) for layer in observed(model, batch()).values())
    assert found["load_balance"].item() == pytest.approx(0.01 * expected.item(), rel=1e-5)
    assert torch.equal(found["loss"], parts(off, model, batch(pad=4))["loss"])
    found["load_balance"].backward()
    moved = {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert "router" in moved
    last = experts(model)["model.layers.3.mlp.down_proj"]
    assert last.router.grad.any() and all(b.grad is None or not b.grad.any() for _, b in last.pairs())


def test_recomputed_activations_change_no_gradient_of_it():
    gradients = []
    for recompute in (False, True):
        chosen = method(load_balance=0.1)
        model = randomise(applied(chosen, tiny_llama())).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        sum(parts(chosen, model, batch(pad=2)).values()).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_it_is_logged_as_the_mean_over_micro_batches(tmp_path, accumulation):
    chosen = method(load_balance=0.5, allocation=[2])
    work = workload(tmp_path, chosen, max_steps=2, gradient_accumulation=accumulation)
    train(work)
    lines = [json.loads(line) for line in work.run.metrics.read_text().splitlines()]
    for line in (line for line in lines if "loss" in line):
        # With two experts for every token f is (1/2, 1/2), so that every layer has E Σ f P = 1 exactly.
        assert line["load_balance"] == pytest.approx(0.5 * 28, rel=1e-4)
        assert line["loss"] == pytest.approx(line["loss_loss"] + line["load_balance"], rel=1e-3)
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert all(loss < 10 for loss in held_out)
