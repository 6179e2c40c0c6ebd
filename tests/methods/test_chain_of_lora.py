"""COLA: links that start anew in everything, and add up to one LoRA."""

import json
from itertools import pairwise

import pytest
import torch
from peft import PeftModel

from peftctl.errors import UsageError
from peftctl.methods import lora
from peftctl.methods.chain_of_lora import Config, Method
from peftctl.tuners.fixed_factors import layers
from tests.methods.helpers import applied, run_steps
from tests.methods.lora_family import check_accumulation, check_encoder_decoder, check_frozen_base, check_resume
from tests.methods.restarts import Seen, after_step, change_ranks, held, lines_of, rates_of
from tests.tiny import tiny_bloom, tiny_llama
from tests.training.helpers import train, trained_tensors, workload

IDS = torch.arange(1, 25).reshape(2, 12)


def method(**keys):
    return Method(Config(**({"r": 2, "alpha": 4, "target_modules": "all-linear"} | keys)))


# -- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("links", "total", "lengths"),
    [
        (1, 10, [10]),
        (2, 10, [5, 5]),
        (2, 9, [5, 4]),
        (3, 9, [3, 3, 3]),
        (3, 10, [4, 4, 2]),
        (3, 4, [2, 2]),  # too short for three of equal length
        (4, 1, [1]),
    ],
)
def test_links_are_equally_long(links, total, lengths):
    chosen = method(links=links, target_modules=["q_proj"])
    model = applied(chosen, tiny_llama())
    begins = [step for step in range(1, total + 1) if after_step(chosen, model, step, total).log]
    ends = [0, *begins, total]
    assert [end - begin for begin, end in pairwise(ends)] == lengths
    assert held(model) == 2 * (len(lengths) - 1)


def test_every_link_has_a_new_optimizer_a_new_pair_and_a_schedule_of_its_own(tmp_path):
    chosen = method(links=2, modules_to_save=["norm"])
    work = workload(tmp_path, chosen, max_steps=8, scheduler="linear", warmup_steps=2, learning_rate=0.01)
    with Seen().watching() as seen:
        model, _ = train(work)
    assert rates_of(work) == pytest.approx([0, 0.005, 0.01, 0.005] * 2)
    assert [step for step, states in seen.states.items() if not states] == [0, 4]
    assert set(seen.states.values()) == {0, len(trained_tensors(model))}  # all are forgotten, the norms' too
    assert seen.zero[0] == seen.zero[4] == {True}
    assert seen.zero[2] == seen.zero[6] == {False}
    assert {line["step"]: line["restarts"] for line in lines_of(work) if "restarts" in line} == {4: 1}


def test_one_link_is_lora_bit_by_bit(tmp_path):
    keys = {"r": 3, "alpha": 5, "dropout": 0.1, "target_modules": "all-linear", "modules_to_save": ["norm"]}
    settings = {"max_steps": 6, "weight_decay": 0.1, "warmup_steps": 2}
    chain = Method(Config(**keys, links=1))
    one, _ = train(workload(tmp_path / "chain", chain, **settings))
    other, _ = train(workload(tmp_path / "lora", lora.Method(lora.Config(**keys)), **settings))
    expected = trained_tensors(other)
    assert expected.keys() == trained_tensors(one).keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_tensors(one).items())
    assert held(one) == 0
    assert chain.export(one).peft_config["default"].r == 3


def test_more_links_are_not_lora(tmp_path):
    chain, _ = train(workload(tmp_path / "chain", method(links=2)))
    plain, _ = train(workload(tmp_path / "lora", method(links=1)))
    assert not torch.equal(chain.eval()(IDS).logits, plain.eval()(IDS).logits)


# -- a knot ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [[], [2, 1, 1]])
def test_a_knot_changes_no_output(ranks):
    chosen = method(links=3, ranks=ranks)
    model = applied(chosen, tiny_llama())
    for step in (4, 8):
        run_steps(model, 3)
        model.eval()
        reference = model(input_ids=IDS).logits
        after_step(chosen, model, step, 12)
        assert (reference - tiny_llama()(input_ids=IDS).logits).abs().max() > 1e-2
        torch.testing.assert_close(model(input_ids=IDS).logits, reference, rtol=0, atol=1e-5)
        assert not any(layer.lora_B["default"].weight.any() for _, layer in layers(model))


@pytest.mark.parametrize(("keys", "rank"), [({}, 6), ({"r": 4, "ranks": [4, 2, 1]}, 7)])
def test_the_result_is_one_lora_whose_rank_is_the_sum_over_links(tmp_path, keys, rank):
    chosen = method(links=3, **keys)
    model, _ = train(workload(tmp_path, chosen, max_steps=12, scheduler="constant", learning_rate=3e-2))
    logits = model.eval()(IDS).logits
    exported = chosen.export(model)
    exported.save_pretrained(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    scale = 4 / chosen.config.r
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", rank, scale * rank)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved").eval()
    torch.testing.assert_close(again(IDS).logits, logits, rtol=0, atol=2e-5)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, logits, rtol=0, atol=5e-5)
    assert change_ranks(merged, tiny_llama()) == {rank}
    assert rank > chosen.config.r


# -- falling ranks ---------------------------------------------------------------------------------------------------


def test_rows_of_a_lower_rank_stay_zero_with_weight_decay_and_the_trained_shapes_stay(tmp_path):
    chosen = method(r=4, links=3, ranks=[4, 3, 1], dropout=0.1)
    straight = check_resume(tmp_path, lambda: method(r=4, links=3, ranks=[4, 3, 1], dropout=0.1), stop=7)
    assert held(straight) == 4 + 3
    for _, layer in layers(straight):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.shape == (4, layer.in_features) and b.shape == (layer.out_features, 4)
        assert a[:1].any() and b[:, :1].any()
        assert torch.count_nonzero(a[1:]) == torch.count_nonzero(b[:, 1:]) == 0
    assert sum(p.numel() for p in trained_tensors(straight).values()) == chosen.count(tiny_llama())


def test_ranks_fall_in_parts_of_a_fused_projection_too():
    chosen = method(r=3, links=2, ranks=[3, 1], target_modules=["query_key_value"], parts=["q", "v"])
    model = applied(chosen, tiny_bloom())
    run_steps(model, 3)
    after_step(chosen, model, 4, 8)
    run_steps(model, 3, weight_decay=0.1)
    for _, layer in layers(model):
        assert not layer.lora_A["default"].weight[1:].any() and not layer.lora_B["default"].weight[:, 1:].any()
    logits = model.eval()(input_ids=IDS).logits
    exported = chosen.export(model)
    assert exported.peft_config["default"].r == 4
    torch.testing.assert_close(exported(input_ids=IDS).logits, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stop", [3, 5], ids=["at the knot", "second link"])
def test_stopped_and_resumed_equals_straight_and_ties_no_knot_twice(tmp_path, stop):
    straight = check_resume(tmp_path, lambda: method(links=3, dropout=0.1), stop=stop)
    resumed = workload(tmp_path / "stopped", method(links=3, dropout=0.1), max_steps=9, weight_decay=0.1)
    again, _ = train(resumed, resumed.run.latest_checkpoint())  # of the last step
    for (_, one), (_, other) in zip(layers(straight), layers(again), strict=True):
        assert torch.equal(one.fixed_factors.E, other.fixed_factors.E) and len(one.fixed_factors.E) == 4
        assert torch.equal(one.fixed_factors.F, other.fixed_factors.F)
    rates = rates_of(resumed)
    assert rates[:3] == rates[3:6] == rates[6:]


# -- the rest --------------------------------------------------------------------------------------------------------


def test_nothing_but_the_pair_moves():
    check_frozen_base(method())


def test_accumulation_changes_nothing(tmp_path):
    check_accumulation(tmp_path, lambda: method(links=2))


def test_an_encoder_decoder_learns():
    check_encoder_decoder(method())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"links": 0}, "greater than 0"),
        ({"links": 3, "ranks": [2, 2]}, r"one rank a link \(3\)"),
        ({"ranks": [4, 2]}, r"the first equal to r \(2\)"),
        ({"r": 4, "links": 3, "ranks": [4, 1, 2]}, r"none above the one before, got \[4, 1, 2\]"),
        ({"ranks": [2, 0]}, "greater than 0"),
        ({"ranks": [2, 1], "rank_pattern": {"q_proj": 4}}, "expected no rank_pattern beside it"),
        ({"init_from": "runs/a"}, r"name it in model\.adapters"),
    ],
)
def test_sections_that_can_not_work_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        method(**keys)


def test_embeddings_are_refused():
    with pytest.raises(UsageError, match="embed_tokens is an embedding; chain_of_lora takes linear layers only"):
        method(target_modules=["embed_tokens"]).count(tiny_llama())
