"""Delta-LoRA: what follows the product in closed form equals the method as written, which changes W in place."""

import json

import pytest
import torch
from peft import PeftModel

from peftctl.errors import UsageError
from peftctl.methods import lora
from peftctl.methods.base import Context, StepInfo
from peftctl.methods.delta_lora import Config, Method
from peftctl.tuners.fixed_factors import layers
from tests.methods.helpers import applied
from tests.methods.lora_family import (
    check_accumulation,
    check_encoder_decoder,
    check_frozen_base,
    check_resume,
    factors,
    lora_layers,
    quantized,
)
from tests.methods.restarts import change_ranks
from tests.tiny import save_tiny, tiny_bloom, tiny_llama
from tests.training.helpers import train, trained_tensors, workload

IDS = torch.arange(1, 25).reshape(2, 12)
SHAPE = {"r": 4, "alpha": 6, "target_modules": "all-linear"}
CONSTANT = {"scheduler": "constant", "weight_decay": 0.1}


def method(**keys):
    return Method(Config(**(SHAPE | {"start": 3} | keys)))


def plain(**keys):
    return lora.Method(lora.Config(**(SHAPE | keys)))


def steps(model, count, before=lambda: None, after=lambda step: None):
    """Train by hand, with weight decay."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model.train()
    for step in range(count):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        before()
        optimizer.step()
        after(step + 1)
    return model.eval()


def followed(chosen, count, base=tiny_llama):
    """Train our closed form in float64."""
    model = applied(chosen, base().double()).double()
    callbacks = chosen.callbacks(model)

    def after(step):
        for callback in callbacks:
            callback.after_step(StepInfo(step, count, model, lambda _: None))

    for callback in callbacks:
        callback.stage_begins(StepInfo(0, count, model, lambda _: None))
    return steps(model, count, after=after)


def in_place(weight, start, count):
    """Train the method as the paper writes it: LoRA, and W += weight * s * (change of B A) after steps >= start."""
    model = applied(plain(), tiny_llama().double()).double()
    old = {}

    def products():
        return {name: b @ a for name, layer in lora_layers(model).items() for _, a, b in [factors(layer)]}

    @torch.no_grad()
    def before():
        old.update(products())

    @torch.no_grad()
    def after(step):
        for name, product in products().items():
            if step > start:
                lora_layers(model)[name].base_layer.weight += weight * 6 / 4 * (product - old[name])

    return steps(model, count, before, after)


# -- the method as written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "start"), [(1.0, 3), (2.0, 0), (0.5, 5), (2.0, 6)])
def test_it_trains_as_the_method_that_changes_w_in_place(weight, start):
    ours, theirs = followed(method(weight=weight, start=start), 6), in_place(weight, start, 6)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-9)
    base = tiny_llama().double()
    for name, layer in lora_layers(theirs).items():
        moved, a, b = factors(layer)
        w, our_a, our_b = factors(lora_layers(ours)[name])
        torch.testing.assert_close(our_a, a, rtol=0, atol=1e-9)
        torch.testing.assert_close(our_b, b, rtol=0, atol=1e-9)
        assert torch.equal(w, base.get_submodule(name.removesuffix(".base_layer")).weight)
        fixed = lora_layers(ours)[name].fixed_factors
        if start >= 6:
            assert fixed is None and torch.equal(moved, w)
            continue
        telescoped = weight * 6 / 4 * (b @ a - fixed.F @ fixed.E)
        torch.testing.assert_close(moved - w, telescoped, rtol=0, atol=1e-10)
        assert fixed.F.any() == (start > 0)


def test_w_is_untouched_and_a_and_b_are_those_of_lora_until_it_starts(tmp_path):
    """With accumulation: K counts optimizer steps, not micro-batches."""
    settings = CONSTANT | {"batch_size": 2, "gradient_accumulation": 2}
    ours, _ = train(workload(tmp_path / "ours", method(start=3), max_steps=5, **settings))
    until, _ = train(workload(tmp_path / "lora", plain(), max_steps=3, **settings))
    for (_, layer), (_, other) in zip(layers(ours), layers(until), strict=True):
        assert torch.equal(layer.fixed_factors.E, other.lora_A["default"].weight)
        assert torch.equal(layer.fixed_factors.F, other.lora_B["default"].weight)
        assert not torch.equal(layer.lora_A["default"].weight, layer.fixed_factors.E)


@pytest.mark.parametrize("keys", [{"weight": 0.0, "start": 2}, {"start": 6}], ids=str)
def test_without_weight_or_steps_left_it_is_lora_bit_by_bit(tmp_path, keys):
    chosen = method(**keys, modules_to_save=["norm"])
    ours, _ = train(workload(tmp_path / "ours", chosen, **CONSTANT))
    other, _ = train(workload(tmp_path / "lora", plain(modules_to_save=["norm"]), **CONSTANT))
    expected = trained_tensors(other)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_tensors(ours).items())
    assert torch.equal(ours.eval()(IDS).logits, other.eval()(IDS).logits)
    assert chosen.export(ours).peft_config["default"].r == 4


@pytest.mark.parametrize(
    ("keys", "settings", "expected"),
    [
        ({}, {"warmup_ratio": 0.25}, 3),  # 2.5, which the schedule rounds up
        ({}, {"warmup_steps": 4}, 4),
        ({}, {}, 0),
        ({"start": 0.2}, {"warmup_steps": 4}, 2),
        ({"start": 0}, {"warmup_ratio": 0.25}, 0),
        ({"start": 7}, {}, 7),
    ],
)
def test_it_starts_where_the_warm_up_ends_unless_told(tmp_path, keys, settings, expected):
    chosen = Method(Config(**SHAPE, **keys))
    work = workload(tmp_path, chosen, max_steps=10, **settings)
    chosen.apply(tiny_llama(), Context(work.recipe))
    assert chosen.start_step(10) == expected


def test_the_default_start_takes_effect(tmp_path):
    model, _ = train(workload(tmp_path, Method(Config(**SHAPE)), max_steps=4, warmup_steps=2, scheduler="linear"))
    assert all(layer.fixed_factors is not None and layer.fixed_factors.F.any() for _, layer in layers(model))


# -- the result ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "rank"), [(3, 8), (0, 4)])
def test_the_result_is_one_lora_of_rank_2r_on_the_original_base(tmp_path, start, rank):
    """From the first step on B_K is zero, and the rank r."""
    chosen = method(start=start, weight=2.0)
    model, _ = train(workload(tmp_path, chosen, max_steps=8, scheduler="constant", learning_rate=2e-2))
    logits = model.eval()(IDS).logits
    assert (logits - tiny_llama()(IDS).logits).abs().max() > 1e-2
    chosen.export(model).save_pretrained(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 8, 12)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved").eval()
    torch.testing.assert_close(again(IDS).logits, logits, rtol=0, atol=1e-5)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, logits, rtol=0, atol=5e-5)
    assert change_ranks(merged, tiny_llama()) == {rank}


def test_ranks_and_scales_of_patterns_double_too():
    chosen = method(rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3})
    model = followed(chosen, 5)
    logits = model(IDS).logits
    exported = chosen.export(model)
    config = exported.peft_config["default"]
    assert (config.rank_pattern, config.alpha_pattern) == ({"q_proj": 4}, {"up_proj": 6})
    torch.testing.assert_close(exported(IDS).logits, logits, rtol=0, atol=1e-11)


def test_the_card_says_that_the_update_telescopes():
    assert "telescope" in Method.card.summary and "rank 2r" in Method.card.summary


# -- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, 6], ids=["at the start", "later"])
def test_stopped_and_resumed_equals_straight_and_keeps_where_it_started(tmp_path, stop):
    straight = check_resume(tmp_path, method, stop=stop)
    resumed = workload(tmp_path / "stopped", method(), max_steps=9, weight_decay=0.1)
    again, _ = train(resumed, resumed.run.latest_checkpoint())  # of the last step
    for (_, one), (_, other) in zip(layers(straight), layers(again), strict=True):
        assert torch.equal(one.fixed_factors.E, other.fixed_factors.E) and one.fixed_factors.E.any()
        assert torch.equal(one.fixed_factors.F, other.fixed_factors.F) and one.fixed_factors.F.any()
    assert torch.equal(straight.eval()(IDS).logits, again.eval()(IDS).logits)


def test_nothing_but_the_pair_moves_and_disabling_gives_the_base():
    check_frozen_base(method())
    model = followed(method(), 5)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, tiny_llama().double()(IDS).logits)


def test_accumulation_changes_nothing(tmp_path):
    check_accumulation(tmp_path, lambda: method(start=1))


def test_an_encoder_decoder_learns():
    check_encoder_decoder(method())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_follows_too_and_is_not_rounded_again(tmp_path, kind):
    folder = save_tiny(tmp_path / "base")
    chosen = method(start=1)
    model = applied(chosen, quantized(folder, kind))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    (callback,) = chosen.callbacks(model)
    steps(model, 4, after=lambda step: callback.after_step(StepInfo(step, 4, model, lambda _: None)))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    with torch.no_grad():
        logits = model(IDS).logits
        torch.testing.assert_close(chosen.export(model)(IDS).logits, logits, rtol=0, atol=1e-5)


def test_parts_of_a_fused_projection_and_rows_of_new_tokens_train_beside_it():
    chosen = method(target_modules=["query_key_value"], parts=["q", "v"], start=2)
    chosen.new_token_ids = [390, 391]
    model = followed(chosen, 4, tiny_bloom)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == chosen.count(tiny_bloom())
    logits = model(IDS).logits
    assert (logits - tiny_bloom().double()(IDS).logits).abs().max() > 1e-3
    torch.testing.assert_close(chosen.export(model)(IDS).logits, logits, rtol=0, atol=1e-11)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dropout": 0.1}, "Extra inputs are not permitted"),
        ({"dropout": 0.0}, "Extra inputs are not permitted"),
        ({"weight": -1.0}, "greater than or equal to 0"),
        ({"start": 1.0}, "less than 1"),
        ({"start": -1}, "greater than or equal to 0"),
        ({"init_from": "runs/a"}, r"has rank 2 r, and this one begins with r; name it in model\.adapters"),
    ],
)
def test_sections_that_can_not_work_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        method(**keys)


def test_embeddings_are_refused():
    with pytest.raises(UsageError, match="embed_tokens is an embedding; delta_lora takes linear layers only"):
        method(target_modules=["embed_tokens"]).count(tiny_llama())
