"""ReLoRA: restarts that keep the function, forget the optimizer's state, and add up to one LoRA of a high rank."""

import copy
import json
import math

import pytest
import torch

from peftctl.errors import Interrupted, UsageError
from peftctl.methods.relora import Config, Method, cycle_steps
from peftctl.models.load import load_model
from peftctl.recipe.schema import ModelSection, QuantizationSection
from peftctl.training.checkpoints import read_state
from peftctl.tuners.fixed_factors import layers
from tests.methods.helpers import applied, run_steps
from tests.methods.restarts import after_step, change_ranks, held
from tests.tiny import save_tiny, tiny_llama, tiny_t5
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

IDS = torch.arange(1, 25).reshape(2, 12)


def method(**keys):
    settings = {"r": 2, "alpha": 4, "cycle": 4, "restart_warmup": 2, "target_modules": "all-linear"}
    return Method(Config(**(settings | keys)))


def cycles_of(model):
    return held(model) // 2


def restarted(chosen, model, step=4, optimizer=None):
    return after_step(chosen, model, step, optimizer=optimizer)


# -- the schedule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "cycle"), [(1, 1), (2, 1), (8, 4), (9, 4), (10, 3), (6, 100), (7, 0.25), (12, 0.5)])
def test_restarts_are_floor_of_steps_minus_one_over_the_cycle(tmp_path, steps, cycle):
    """A restart after the last step would leave nothing to train what it begins."""
    chosen = method(cycle=cycle)
    model, _ = train(workload(tmp_path, chosen, max_steps=steps, save_steps=100))
    every, _ = cycle_steps(chosen.config, steps)
    assert cycles_of(model) == (steps - 1) // every


@pytest.mark.parametrize(
    ("keys", "total", "expected"),
    [
        ({"cycle": 0.25, "restart_warmup": 0.05}, 200, (50, 2)),
        ({"cycle": 100, "restart_warmup": 10}, 400, (100, 10)),
        ({"cycle": 0.25, "restart_warmup": 0.5}, 8, (2, 1)),
        ({"cycle": 0.25, "restart_warmup": 0.05}, 1, (1, 0)),
    ],
)
def test_lengths_in_steps(keys, total, expected):
    assert cycle_steps(Config(**keys), total) == expected


def shape(step, total=400, first=20, least=0.1):
    """The schedule of the authors' example: a cosine to a tenth after a first warm-up."""
    if step < first:
        return step / first
    return least + (1 - least) * (1 + math.cos(math.pi * (step - first) / (total - first))) / 2


@pytest.mark.parametrize(
    ("step", "authors"), [(0, 0), (10, 0.5), (20, 1), (99, 0.907), (100, 0), (105, 0.441), (110, 0.881), (399, 0.1)]
)
def test_the_jagged_rate_is_the_schedule_times_a_warm_up_after_every_restart(step, authors):
    """The authors hold the schedule at the end of a warm-up while it lasts; ours goes on, otherwise they are equal."""
    chosen = method(cycle=100, restart_warmup=10)
    ours = shape(step) * chosen.learning_rate_factor(step, 400)
    held = step + 10 - step % 100 if step >= 100 and step % 100 < 10 else step
    assert (ours * shape(held) / shape(step) if step else ours) == pytest.approx(authors, abs=5e-4)
    assert ours == pytest.approx(authors, abs=0.008)


def test_the_rate_rises_in_even_steps_after_each_restart_only():
    chosen = method(cycle=5, restart_warmup=3)
    rates = [chosen.learning_rate_factor(step, 13) for step in range(13)]
    expected = [1, 1, 1, 1, 1, 0, 1 / 3, 2 / 3, 1, 1, 0, 1 / 3, 2 / 3]
    assert rates == pytest.approx(expected, abs=1e-12)
    assert {method(cycle=5, restart_warmup=0).learning_rate_factor(step, 13) for step in range(13)} == {1.0}


def test_the_trainer_takes_the_rate(tmp_path):
    work = workload(tmp_path, method(cycle=4, restart_warmup=2), max_steps=10, scheduler="constant", learning_rate=0.01)
    train(work)
    lines = [json.loads(line) for line in work.run.metrics.read_text().splitlines()]
    rates = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    assert [rates[step] for step in range(1, 10)] == pytest.approx([0.01] * 4 + [0, 0.005, 0.01, 0.01, 0])
    assert {line["step"]: line["restarts"] for line in lines if "restarts" in line} == {4: 1, 8: 2}


# -- a restart -----------------------------------------------------------------------------------------------------


def test_the_output_is_the_same_before_and_after_a_restart():
    chosen = method(dropout=0.0)
    model = applied(chosen, tiny_llama().double()).double()
    for step in (4, 8):
        run_steps(model, 3)
        model.eval()
        reference = model(input_ids=IDS).logits
        restarted(chosen, model, step)
        assert (reference - tiny_llama().double()(input_ids=IDS).logits).abs().max() > 1e-2
        torch.testing.assert_close(model(input_ids=IDS).logits, reference, rtol=0, atol=1e-12)
        assert not any(layer.lora_B["default"].weight.any() for _, layer in layers(model))


def test_every_cycle_draws_an_a_of_its_own():
    chosen = method()
    model = applied(chosen, tiny_llama())
    seen = [[layer.lora_A["default"].weight.detach().clone() for _, layer in layers(model)]]
    for step in (4, 8):
        restarted(chosen, model, step)
        now = [layer.lora_A["default"].weight.detach().clone() for _, layer in layers(model)]
        assert not any(torch.equal(a, b) for before in seen for a, b in zip(before, now, strict=True))
        seen.append(now)


def test_the_optimizer_forgets_a_and_b_and_nothing_else():
    chosen = method(modules_to_save=["norm"])
    model = applied(chosen, tiny_llama()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    norm = next(p for n, p in model.named_parameters() if "modules_to_save" in n)
    moment = optimizer.state[norm]["exp_avg"].clone()
    restarted(chosen, model, optimizer=optimizer)
    assert set(optimizer.state) == {norm}
    assert torch.equal(optimizer.state[norm]["exp_avg"], moment) and moment.any()


def test_the_first_update_after_a_restart_is_no_larger_than_the_rate(tmp_path):
    """With the step count kept and the moments zeroed it would be twice as large."""
    chosen = method(cycle=30, restart_warmup=0)
    before, _ = train(workload(tmp_path / "a", chosen, max_steps=31, scheduler="constant", max_grad_norm=0.0))
    for _, layer in layers(before):
        assert 0 < layer.lora_B["default"].weight.abs().max() <= 1e-2 * 1.001  # B was 0 one step ago


def test_every_tensor_learns_in_the_first_cycle():
    """The authors' code zeroes A beside B = 0, where both gradients are zero until the first restart."""
    model = applied(method(), tiny_llama())
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    run_steps(model, 3)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_the_rank_of_the_change_grows_by_r_a_cycle():
    chosen = method(target_modules=["q_proj"])
    model = applied(chosen, tiny_llama())
    for cycle in (1, 2, 3):
        run_steps(model, 4)
        one = chosen.export(copy.deepcopy(model))
        for _, layer in layers(one):
            change = layer.get_delta_weight("default").double()
            assert torch.linalg.matrix_rank(change, tol=1e-6) == 2 * cycle
        restarted(chosen, model, 4 * cycle)


def test_a_run_of_three_cycles_moves_the_weights_by_a_rank_of_two_four_and_six(tmp_path):
    chosen, ranks = method(), []
    for steps in (4, 8, 12):
        work = workload(tmp_path / str(steps), chosen, max_steps=steps, scheduler="constant", learning_rate=3e-2)
        merged = chosen.export(train(work)[0]).merge_and_unload()
        ranks.append(change_ranks(merged, tiny_llama()))
    assert ranks == [{2}, {4}, {6}]


# -- a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [4, 6], ids=["at the restart", "second cycle"])
def test_stopped_and_resumed_equals_straight_bit_by_bit(tmp_path, stop):
    straight, _ = train(workload(tmp_path / "straight", method(dropout=0.1), max_steps=10))
    with pytest.raises(Interrupted):
        train(workload(tmp_path / "stopped", method(dropout=0.1), max_steps=10, reporter=StopAt(stop)))
    resumed = workload(tmp_path / "stopped", method(dropout=0.1), max_steps=10)
    again, _ = train(resumed, resumed.run.latest_checkpoint())
    for name, tensor in trained_tensors(straight).items():
        assert torch.equal(trained_tensors(again)[name], tensor), name
    for (_, one), (_, other) in zip(layers(straight), layers(again), strict=True):
        assert torch.equal(one.fixed_factors.E, other.fixed_factors.E) and len(one.fixed_factors.E) == 4
        assert torch.equal(one.fixed_factors.F, other.fixed_factors.F)


def test_earlier_weights_take_the_later_cycles_back(tmp_path):
    """`load_best` reads a checkpoint into a model that has restarted since."""
    chosen = method()
    with pytest.raises(Interrupted):
        train(workload(tmp_path, chosen, max_steps=10, reporter=StopAt(6)))
    checkpoint = workload(tmp_path, chosen).run.latest_checkpoint()
    model = applied(chosen, tiny_llama()).eval()
    read_state(checkpoint, model, chosen)
    assert cycles_of(model) == 1
    reference = model(input_ids=IDS).logits
    for step in (8, 12):
        run_steps(model, 2)
        restarted(chosen, model, step)
    read_state(checkpoint, model.eval(), chosen)
    assert cycles_of(model) == 1
    assert torch.equal(model(input_ids=IDS).logits, reference)


@pytest.mark.parametrize("base", [tiny_llama, tiny_t5])
def test_the_result_is_one_lora_of_all_cycles_on_the_original_base(base, tmp_path):
    from peft import PeftModel

    chosen = method()
    model = applied(chosen, base())
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if base is tiny_t5 else {})
    for step in (4, 8):
        run_steps(model, 3)
        restarted(chosen, model, step)
    run_steps(model, 3)
    model.eval()
    logits = model(**inputs).logits
    exported = chosen.export(model)
    exported.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 6, 12)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, logits, rtol=0, atol=1e-5)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, logits, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:Merge lora module to:UserWarning")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_loses_nothing_at_a_restart(bits, tmp_path):
    section = ModelSection(name_or_path=str(save_tiny(tmp_path / "base")), dtype="float32")
    base = load_model(section, device="cpu", quantization=QuantizationSection(bits=bits))
    chosen = method()
    model = applied(chosen, base)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    for step in (4, 8):
        losses = run_steps(model, 3)
        assert losses[-1] < losses[0]
        model.eval()
        with torch.no_grad():
            reference = model(IDS).logits
            restarted(chosen, model, step)
            torch.testing.assert_close(model(IDS).logits, reference, rtol=0, atol=1e-5)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    with torch.no_grad():
        torch.testing.assert_close(chosen.export(model)(IDS).logits, reference, rtol=0, atol=1e-5)


def test_parts_of_a_fused_projection_restart_too():
    from tests.tiny import tiny_bloom

    chosen = method(target_modules=["query_key_value"], parts=["q", "v"])
    model = applied(chosen, tiny_bloom())
    run_steps(model, 3)
    model.eval()
    reference = model(input_ids=IDS).logits
    restarted(chosen, model)
    assert not any(p.any() for n, p in model.named_parameters() if "lora_B" in n)
    torch.testing.assert_close(model(input_ids=IDS).logits, reference, rtol=0, atol=1e-5)
    run_steps(model, 3)
    model.eval()
    logits = model(input_ids=IDS).logits
    torch.testing.assert_close(chosen.export(model)(input_ids=IDS).logits, logits, rtol=0, atol=1e-5)


def test_rows_of_new_tokens_stay_and_keep_their_moments():
    chosen = method()
    chosen.new_token_ids = [390, 391]
    model = applied(chosen, tiny_llama()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.cat([IDS, torch.tensor([[390], [391]])], dim=1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    restarted(chosen, model, optimizer=optimizer)
    rows = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    assert rows and set(optimizer.state) == set(rows)


# -- counts and refusals -------------------------------------------------------------------------------------------


def test_trainable_count_is_that_of_one_cycle():
    chosen = method()
    expected = chosen.count(tiny_llama())
    model = applied(chosen, tiny_llama())
    for step in (4, 8):
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
        restarted(chosen, model, step)
    assert expected == sum(2 * (layer.in_features + layer.out_features) for _, layer in layers(model))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"init_from": "runs/a"}, r"this one begins with r; name it in model\.adapters"),
        ({"cycle": 0}, "greater than 0"),
        ({"cycle": 1.0}, "less than 1"),
        ({"restart_warmup": 1.0}, "less than 1"),
        ({"init": "gaussian"}, "kaiming"),
    ],
)
def test_sections_that_can_not_work_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        method(**keys)


def test_embeddings_are_refused():
    with pytest.raises(UsageError, match=r"model\.embed_tokens is an embedding; relora takes linear layers only"):
        method(target_modules=["embed_tokens"]).count(tiny_llama())
