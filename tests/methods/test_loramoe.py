"""LoRAMoE: where its experts stand, the localised balancing loss, and which half of the experts it favours."""

import json

import pytest
import torch
from pydantic import ValidationError

from peftctl.errors import UsageError
from peftctl.evaluation.loss import held_out_loss
from peftctl.methods._routed import Routed
from peftctl.methods.base import Context
from peftctl.methods.loramoe import Config, Method, importance, localised_balance
from peftctl.recipe.schema import Source
from tests.methods.helpers import applied, recipe
from tests.methods.routed import batch, check_moves, check_quantised, check_resume, experts, observed, parts, randomise
from tests.tiny import tiny_llama, tiny_opt
from tests.training.helpers import train, workload

TYPES = torch.tensor([0, 1, 0, 1])


def method(**keys):
    return Method(Config(**{"experts": 4, "r": 2, "alpha": 4, **keys}))


def routed(p, mask=None):
    """Return the routing of a layer for probabilities (batch, seq, E)."""
    return Routed("layer", p, p, torch.ones(p.shape[:2], dtype=p.dtype) if mask is None else mask)


def even(rows=4, seq=5, experts=6):
    return routed(torch.full((rows, seq, experts), 1 / experts, dtype=torch.float64))


def balance(layer, types=TYPES, **keys):
    return localised_balance(layer, importance(Config(experts=6, **keys), types, layer))


# -- the loss ------------------------------------------------------------------------------------------------------


def test_even_routing_costs_nothing_without_delta_and_0_0104_with():
    assert balance(even(), delta=0.0).item() == pytest.approx(0, abs=1e-20)
    # 24 entries, half 0.9 and half 1.1: 24 / 23 * 0.01 with the unbiased variance.
    assert balance(even(), delta=0.1).item() == pytest.approx(0.010435, abs=1e-6)


def test_it_is_the_variance_over_the_squared_mean_of_all_entries():
    p = torch.randn(4, 5, 6, dtype=torch.float64).softmax(-1)
    mask = torch.ones(4, 5).double()
    mask[1, 2:], mask[3, 4:] = 0, 0
    z = []
    for row in range(4):
        for e in range(6):
            q = sum(p[row, place, e].item() for place in range(5) if mask[row, place])
            favoured = (e < 3) == (TYPES[row] == 0)  # rows of type 0 are served by the first half
            z.append(q * (1 - 0.2 if favoured else 1 + 0.2))
    mean = sum(z) / 24
    expected = sum((value - mean) ** 2 for value in z) / 23 / (mean**2 + 1e-10)
    assert balance(routed(p, mask), delta=0.2).item() == pytest.approx(expected, rel=1e-12)


def test_it_does_not_change_with_the_scale_of_q():
    p = torch.randn(4, 5, 6, dtype=torch.float64).softmax(-1)
    thrice = routed(p.repeat(1, 3, 1))
    assert balance(thrice).item() == pytest.approx(balance(routed(p)).item(), rel=1e-8)


def test_other_types_and_other_halves_cost_the_same():
    p = torch.randn(4, 5, 6, dtype=torch.float64).softmax(-1)
    swapped = routed(torch.cat([p[..., 3:], p[..., :3]], dim=-1))
    assert balance(swapped, 1 - TYPES).item() == pytest.approx(balance(routed(p)).item(), rel=1e-12)
    other = balance(routed(p), 1 - TYPES)
    assert abs(other.item() - balance(routed(p)).item()) > 1e-4
    assert balance(routed(p), favoured_half="second").item() == pytest.approx(other.item(), rel=1e-12)


@pytest.mark.parametrize("half", ["first", "second"])
def test_descent_gives_the_favoured_half_more_weight(half):
    logits = torch.zeros(2, 1, 6, dtype=torch.float64, requires_grad=True)
    types = torch.tensor([0, 1])
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-16)

    def step():
        optimizer.zero_grad()
        loss = balance(routed(logits.softmax(-1)), types, delta=0.1, favoured_half=half)
        loss.backward()
        return loss

    optimizer.step(step)
    w = logits.detach().softmax(-1)[:, 0]
    more, less = 1.1 / 6, 0.9 / 6  # as 1 / I: 0.183 and 0.150
    serving = [more] * 3 + [less] * 3
    for row, expected in zip(w, (serving, serving[::-1]) if half == "first" else (serving[::-1], serving), strict=True):
        assert row.tolist() == pytest.approx(expected, abs=1e-4)


# -- in a model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt])
def test_padding_does_not_change_the_loss(base):
    chosen = method(task_types=[1])
    model = randomise(applied(chosen, base())).double()
    short = parts(chosen, model, batch(task_ids=[0, 0]))["balance"]
    padded = parts(chosen, model, batch(pad=6, task_ids=[0, 0]))["balance"]
    assert padded.item() == pytest.approx(short.item(), rel=1e-7) and short > 0


def test_it_is_the_mean_over_layers_times_its_weight_and_reads_the_type_of_each_source():
    chosen = method(balance=0.3, delta=0.2, task_types=[1, 0, 1])
    model = randomise(several(chosen))
    found = parts(chosen, model, batch(task_ids=[2, 1]))
    seen = observed(model, batch()).values()
    types = torch.tensor([1, 0])
    losses = [localised_balance(layer, importance(chosen.config, types, layer)).item() for layer in seen]
    assert len(losses) == 12
    assert found["balance"].item() == pytest.approx(0.3 * sum(losses) / 12, rel=1e-5)
    other = parts(chosen, model, batch(task_ids=[1, 1]))
    assert torch.equal(other["loss"], found["loss"]) and not torch.equal(other["balance"], found["balance"])


def several(chosen):
    """Apply to a recipe of three sources."""
    made = recipe()
    sources = [Source(path=f"{name}.jsonl") for name in "abc"]
    data = made.data.model_copy(update={"train": None, "sources": sources})
    torch.manual_seed(0)
    return chosen.apply(tiny_llama(), Context(made.model_copy(update={"data": data})))


def test_its_gradient_reaches_routers():
    chosen = method()
    model = randomise(applied(chosen, tiny_llama()))
    parts(chosen, model, batch(task_ids=[-1, -1]))["balance"].backward()
    last = experts(model)["model.layers.3.mlp.down_proj"]
    assert last.router.grad.any() and not any(p.grad is not None and p.grad.any() for p in last.pairs()[0])


def test_off_it_is_no_part_and_held_out_loss_never_has_it(tmp_path):
    on, off = method(balance=10.0), method(balance=0.0)
    model = randomise(applied(on, tiny_llama()))
    inputs = batch(task_ids=[0, 0])
    assert set(parts(off, model, inputs)) == {"loss"} and set(parts(on, model, inputs)) == {"loss", "balance"}
    losses = []
    for name, chosen in (("on", on), ("off", off)):
        work = workload(tmp_path / name, chosen)
        losses.append(held_out_loss(model, work.eval_rows, work.collate, 2))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_is_logged_beside_the_loss(tmp_path, accumulation):
    chosen = method(balance=0.5, delta=0.3)
    work = workload(tmp_path, chosen, max_steps=2, gradient_accumulation=accumulation)
    work.collate.fields = chosen.fields()
    train(work)
    lines = [json.loads(line) for line in work.run.metrics.read_text().splitlines()]
    for line in (line for line in lines if "loss" in line):
        assert 0 < line["balance"] < 1
        assert line["loss"] == pytest.approx(line["loss_loss"] + line["balance"], rel=1e-3)


def test_recomputed_activations_change_no_gradient():
    gradients = []
    for recompute in (False, True):
        chosen = method(balance=1.0)
        model = randomise(applied(chosen, tiny_llama())).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        sum(parts(chosen, model, batch(pad=2, task_ids=[0, 0])).values()).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


# -- what trains ---------------------------------------------------------------------------------------------------


def test_experts_stand_in_the_feed_forward_part_and_start_kaiming_uniform():
    chosen = method()
    model = applied(chosen, tiny_llama())
    ends = ("gate_proj", "up_proj", "down_proj")
    assert set(experts(model)) == {f"model.layers.{i}.mlp.{end}" for i in range(4) for end in ends}
    for one in experts(model).values():
        bound = one.router.shape[1] ** -0.5
        assert all(0.75 * bound < drawn.abs().max() <= bound for drawn in (one.router, one.pairs()[0][0]))
        assert not one.pairs()[0][1].any()
    expected = 4 * (2 * 4 * (2 * 96 + 32) + 4 * (2 * 96 + 64))
    assert chosen.count(tiny_llama()) == expected == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_at_first_the_task_moves_b_only():
    chosen = method(balance=0.0)
    model = applied(chosen, tiny_llama())
    parts(chosen, model, batch(task_ids=[0, 0]))["loss"].backward()
    for one in experts(model).values():
        ((a, b),) = one.pairs()
        assert not one.router.grad.any() and not a.grad.any() and b.grad.any()


def test_three_steps_move_experts_and_routers_and_nothing_else():
    check_moves(applied(method(), tiny_llama()))


def test_stopped_and_resumed_equals_straight(tmp_path, monkeypatch):
    monkeypatch.setattr(Method, "routing_losses", _with_types(Method.routing_losses))
    check_resume(tmp_path, method)


def _with_types(original):
    def losses(self, routed, inputs):
        return original(self, routed, {**inputs, "task_ids": torch.zeros(len(inputs["labels"]), dtype=torch.long)})

    return losses


@pytest.mark.parametrize("bits", [4, 8])
def test_over_a_quantised_base(tmp_path, bits):
    check_quantised(tmp_path, method, bits)


# -- the section ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"experts": 5}, "expected an even number, as there are two halves, got 5"),
        ({"task_types": [0, 2]}, "0 or 1"),
        ({"task_types": []}, "at least 1 item"),
        ({"delta": 1.0}, "less than 1"),
    ],
)
def test_what_has_no_halves_or_types_is_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        method(**keys)


def test_types_are_those_of_the_sources():
    with pytest.raises(UsageError, match=r"method\.task_types: expected 3 .* one for each of data\.sources, got 1"):
        several(method())
    with pytest.raises(UsageError, match=r"method\.task_types: expected 1 .* as data\.train is one source, got 2"):
        applied(method(task_types=[0, 1]), tiny_llama())


def test_a_single_type_is_said_to_favour_one_half_throughout():
    (notice,) = method().notices(None)
    assert "all rows are of type 0" in notice
    assert not method(task_types=[0, 1]).notices(None) and not method(balance=0.0).notices(None)
