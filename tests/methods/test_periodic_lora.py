"""PeriodicLoRA: a share of the update is unloaded in every period, and the function stays as it was."""

import json

import pytest
import torch
from peft import PeftModel

from peftctl.errors import UsageError
from peftctl.methods import lora, relora
from peftctl.methods.periodic_lora import Config, Method
from peftctl.tuners.fixed_factors import layers
from tests.methods.helpers import applied, run_steps
from tests.methods.lora_family import check_accumulation, check_encoder_decoder, check_frozen_base, check_resume
from tests.methods.restarts import Seen, after_step, change_ranks, held, lines_of, rates_of
from tests.tiny import tiny_llama
from tests.training.helpers import train, trained_tensors, workload

IDS = torch.arange(1, 25).reshape(2, 12)


def method(**keys):
    return Method(Config(**({"r": 2, "alpha": 4, "period": 3, "target_modules": "all-linear"} | keys)))


def factors(named):
    return [
        (x.lora_A["default"].weight.detach().clone(), x.lora_B["default"].weight.detach().clone()) for _, x in named
    ]


# -- unloading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_unloading_any_share_changes_no_output(share):
    chosen = method(unload_share=share)
    model = applied(chosen, tiny_llama().double()).double()
    for step in (3, 6):
        run_steps(model, 3)
        model.eval()
        reference = model(input_ids=IDS).logits
        after_step(chosen, model, step)
        torch.testing.assert_close(model(input_ids=IDS).logits, reference, rtol=0, atol=1e-12)
    assert (reference - tiny_llama().double()(input_ids=IDS).logits).abs().max() > 1e-2


def test_a_share_is_unloaded_and_the_rest_stays_in_both_factors():
    chosen = method(unload_share=0.36)
    model = applied(chosen, tiny_llama().double()).double()
    run_steps(model, 3)
    before = factors(layers(model))
    after_step(chosen, model, 3)
    for (a, b), (_, layer) in zip(before, layers(model), strict=True):
        fixed = layer.fixed_factors
        torch.testing.assert_close(fixed.F @ fixed.E, 0.36 * b @ a, rtol=0, atol=1e-14)
        torch.testing.assert_close(layer.lora_A["default"].weight, 0.8 * a, rtol=0, atol=1e-14)
        torch.testing.assert_close(layer.lora_B["default"].weight, 0.8 * b, rtol=0, atol=1e-14)


def test_a_share_of_one_begins_anew():
    chosen = method(unload_share=1.0)
    model = applied(chosen, tiny_llama())
    run_steps(model, 3)
    before = factors(layers(model))
    after_step(chosen, model, 3)
    for (a, b), (after, zero) in zip(before, factors(layers(model)), strict=True):
        assert b.any() and not zero.any()
        assert not torch.equal(after, a) and after.abs().max() <= after.shape[1] ** -0.5


def test_a_share_of_nothing_is_lora_bit_by_bit(tmp_path):
    """A, B, W, the optimizer and the schedule are as if there were no periods."""
    keys = {"r": 2, "alpha": 4, "dropout": 0.1, "target_modules": "all-linear", "modules_to_save": ["norm"]}
    settings = {"max_steps": 7, "weight_decay": 0.1, "warmup_steps": 2}
    work = workload(tmp_path / "periodic", Method(Config(**keys, period=3, unload_share=0.0)), **settings)
    plain = workload(tmp_path / "lora", lora.Method(lora.Config(**keys)), **settings)
    with Seen().watching() as seen:
        one, _ = train(work)
    other, _ = train(plain)
    expected = trained_tensors(other)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_tensors(one).items())
    assert held(one) == 0 and rates_of(work) == rates_of(plain)
    assert [step for step, states in seen.states.items() if not states] == [0]
    assert work.method.export(one).peft_config["default"].r == 2


def test_a_share_of_one_is_the_restart_of_relora_without_its_envelope(tmp_path):
    settings = {"max_steps": 8, "scheduler": "constant", "weight_decay": 0.1}
    other = relora.Config(r=2, alpha=4, cycle=3, restart_warmup=0, target_modules="all-linear")
    one, _ = train(workload(tmp_path / "periodic", method(), **settings))
    two, _ = train(workload(tmp_path / "relora", relora.Method(other), **settings))
    expected = trained_tensors(two)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_tensors(one).items())
    for (_, ours), (_, theirs) in zip(layers(one), layers(two), strict=True):
        assert torch.equal(ours.fixed_factors.E, theirs.fixed_factors.E)
        assert torch.equal(ours.fixed_factors.F, theirs.fixed_factors.F)


# -- periods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_every_period_has_the_schedule_and_an_empty_optimizer(tmp_path, share):
    """Moments of factors that were shrunk are stale too."""
    chosen = method(unload_share=share, modules_to_save=["norm"], period=4)
    work = workload(tmp_path, chosen, max_steps=10, scheduler="linear", warmup_steps=2, learning_rate=0.01)
    with Seen().watching() as seen:
        train(work)
    assert rates_of(work) == pytest.approx([0, 0.005, 0.01, 0.005] * 2 + [0, 0.005])
    assert [step for step, states in seen.states.items() if not states] == [0, 4, 8]
    assert seen.zero[4] == seen.zero[8] == {share == 1.0}
    assert {line["step"]: line["restarts"] for line in lines_of(work) if "restarts" in line} == {4: 1, 8: 2}


@pytest.mark.parametrize(("period", "total", "rank"), [(3, 9, 6), (3, 10, 8), (0.25, 8, 8), (20, 8, 2), (0.01, 2, 4)])
def test_the_last_period_is_saved_once(tmp_path, period, total, rank):
    """Not unloaded at the end and saved as A and B again: the rank is r times the periods that were trained."""
    chosen = method(period=period, unload_share=0.5)
    model, _ = train(workload(tmp_path, chosen, max_steps=total, save_steps=100))
    logits = model.eval()(IDS).logits
    exported = chosen.export(model)
    assert exported.peft_config["default"].r == rank
    torch.testing.assert_close(exported(IDS).logits, logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_result_is_one_lora_whose_rank_grows_with_the_periods(tmp_path, share):
    chosen = method(period=4, unload_share=share)
    ranks = []
    for steps in (4, 8, 12):
        folder = tmp_path / str(steps)
        model, _ = train(workload(folder, chosen, max_steps=steps, scheduler="constant", learning_rate=3e-2))
        logits = model.eval()(IDS).logits
        chosen.export(model).save_pretrained(folder / "saved")
        settings = json.loads((folder / "saved" / "adapter_config.json").read_text())
        assert settings["peft_type"] == "LORA" and settings["lora_alpha"] == 2 * settings["r"]
        again = PeftModel.from_pretrained(tiny_llama(), folder / "saved").eval()
        torch.testing.assert_close(again(IDS).logits, logits, rtol=0, atol=2e-5)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, logits, rtol=0, atol=5e-5)
        ranks.append(change_ranks(merged, tiny_llama()))
    assert ranks == [{2}, {4}, {6}]


@pytest.mark.parametrize(("share", "stop"), [(0.5, 3), (0.5, 5), (1.0, 3)])
def test_stopped_and_resumed_equals_straight_bit_by_bit(tmp_path, share, stop):
    straight = check_resume(tmp_path, lambda: method(unload_share=share, dropout=0.1), stop=stop)
    assert held(straight) == 4


# -- the rest --------------------------------------------------------------------------------------------------------


def test_nothing_but_the_pair_moves():
    check_frozen_base(method())


def test_accumulation_changes_nothing(tmp_path):
    check_accumulation(tmp_path, lambda: method(unload_share=0.5))


def test_an_encoder_decoder_learns():
    check_encoder_decoder(method())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"period": 0}, "greater than 0"),
        ({"period": 1.0}, "less than 1"),
        ({"unload_share": 1.1}, "less than or equal to 1"),
        ({"unload_share": -0.1}, "greater than or equal to 0"),
        ({"init_from": "runs/a"}, r"name it in model\.adapters"),
    ],
)
def test_sections_that_can_not_work_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        method(**keys)


def test_embeddings_are_refused():
    with pytest.raises(UsageError, match="embed_tokens is an embedding; periodic_lora takes linear layers only"):
        method(target_modules=["embed_tokens"]).count(tiny_llama())
