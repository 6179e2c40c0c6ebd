"""AdapterDrop: which blocks have no adapter when, where the backward pass ends, and what the artefact answers."""

import json
import subprocess
import sys
from collections import Counter

import pytest
import torch
from peft import PeftModel

import peftctl.tuners  # noqa: F401  # peft learns the type
from peftctl.artifacts.load import load
from peftctl.errors import Interrupted, UsageError
from peftctl.methods import houlsby, pfeiffer
from peftctl.methods.adapter_drop import Config, Method
from peftctl.methods.base import StepInfo
from peftctl.tuners.adapter_drop import drop_in_training
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, context, recipe, run_steps
from tests.methods.test_houlsby import IDS, PLAIN, SMOLLM2, layers, logits
from tests.methods.test_pfeiffer import post_norm
from tests.tiny import save_tiny, tiny_bart, tiny_llama, tiny_opt, tiny_t5
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

PLACEMENTS = ["pfeiffer", "houlsby"]
DEPTH = 4
"""Blocks of the tiny Llama, and of encoder and decoder of the tiny T5 and BART together."""


def method(**keys):
    return Method(Config(**{"bottleneck": 6, **keys}))


def fixed(drop, **keys):
    return method(mode="fixed", drop=drop, **keys)


def plain(placement):
    if placement == "houlsby":
        return houlsby.Method(houlsby.Config(bottleneck=6, activation="relu", train_norms=False))
    return pfeiffer.Method(pfeiffer.Config(bottleneck=6))


def randomised(chosen, base):
    """Apply a method; give every adapter the values that it has in any other model of these tests, by its name."""
    model = applied(chosen, base())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def states(model):
    """Return the stream at the ends of the tiny Llama's blocks."""
    with torch.no_grad():
        return model(input_ids=IDS, output_hidden_states=True).hidden_states[1:]


def drawn(seed=0, steps=200, **keys):
    """Return the n of every step, as the run's callback draws them."""
    chosen = method(**keys)
    model = chosen.apply(tiny_llama(), type(context())(recipe(seed=seed)))
    _, draws = chosen.callbacks(model)
    found = []
    for step in range(steps):
        info = StepInfo(step, steps, model, lambda _: None)
        draws.after_step(info) if step else draws.stage_begins(info)
        (n,) = {layer.training_drop for layer in layers(model).values()}
        found.append(n)
    return found


# -- n = 0, n = L, and between --------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, post_norm, tiny_t5, tiny_bart])
def test_none_dropped_is_the_plain_adapter_and_all_dropped_is_the_base(base, placement):
    reference = logits(base())
    whole = logits(randomised(plain(placement), base))
    blocks = 2 if base in (tiny_opt, post_norm) else DEPTH
    assert not torch.equal(whole, reference)
    assert torch.equal(logits(randomised(fixed(0, placement=placement), base)), whole)
    answers = [logits(randomised(method(placement=placement, eval_drop=n), base)) for n in range(blocks + 1)]
    assert torch.equal(answers[0], whole)
    assert torch.equal(answers[-1], reference)
    for n in range(blocks):  # to rest is to be absent
        assert torch.equal(answers[n], logits(randomised(fixed(n, placement=placement), base)))
        assert not torch.equal(answers[n], answers[n + 1])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("n", range(DEPTH + 1))
def test_states_of_the_lower_blocks_are_the_bases_bit_for_bit(n, placement):
    reference = states(tiny_llama())
    model = randomised(method(placement=placement, eval_drop=n), tiny_llama)
    equal = [torch.equal(a, b) for a, b in zip(states(model), reference, strict=True)]
    assert equal == [True] * n + [False] * (DEPTH - n)


@pytest.mark.parametrize("base", [tiny_llama, post_norm, tiny_t5])
@pytest.mark.parametrize("mode", ["fixed", "robust"])
def test_adapters_that_start_at_zero_make_no_difference_for_any_n(base, mode):
    reference = logits(base())
    for n in range(2):
        model = applied(fixed(n) if mode == "fixed" else method(eval_drop=n), base())
        assert torch.equal(logits(model), reference)
        drop_in_training(model, n)
        assert torch.equal(logits(model.train()), reference)


# -- the backward pass ----------------------------------------------------------------------------------------------


def backward(model, base):
    """Train without a step; return whether what enters each block needs a gradient."""
    needs = []
    decoder = model.get_base_model()
    blocks = decoder.model.layers if base is tiny_llama else [*decoder.encoder.block, *decoder.decoder.block]
    hooks = [b.register_forward_pre_hook(lambda _, args: needs.append(args[0].requires_grad)) for b in blocks]
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for hook in hooks:
        hook.remove()
    return needs


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("mode", ["fixed", "robust"])
@pytest.mark.parametrize("base", [tiny_llama, tiny_t5])
def test_no_gradient_flows_below_the_lowest_adapter_that_works(base, mode, placement):
    for n in range(DEPTH):
        chosen = fixed(n, placement=placement) if mode == "fixed" else method(placement=placement)
        model = randomised(chosen, base)
        if mode == "robust":
            drop_in_training(model, n)
        needs = backward(model, base)
        # An encoder's first block and a decoder's first block read embeddings, which never need one.
        first = {0} if base is tiny_llama else {0, 2}
        assert needs == [depth > n and depth not in first for depth in range(DEPTH)]
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        depths = {name: chosen_depth(name, base) for name in trainable}
        if mode == "robust":
            assert set(depths.values()) == set(range(DEPTH))  # what trains does not change
        else:
            assert set(depths.values()) == set(range(n, DEPTH))
        for name, p in trainable.items():
            assert (p.grad is not None and bool(p.grad.any())) == (depths[name] >= n), name


def chosen_depth(name, base):
    parts = name.split(".")
    if base is tiny_llama:
        return int(parts[parts.index("layers") + 1])
    return int(parts[parts.index("block") + 1]) + 2 * ("decoder" in parts)


@pytest.mark.parametrize("mode", ["fixed", "robust"])
def test_recomputed_activations_end_at_the_same_block_with_the_same_weights(tmp_path, mode):
    found = []
    for again in (False, True):
        chosen = Entered(Config(bottleneck=6, mode=mode, drop=2 if mode == "fixed" else None))
        work = workload(tmp_path / str(again), chosen, max_steps=4, gradient_checkpointing=again)
        found.append(trained_tensors(train(work)[0]))
        steps = [2] * 4 if mode == "fixed" else drawn(steps=4)
        expected = [[depth > n and depth > 0 for depth in range(DEPTH)] for n in steps]
        assert [needs for needs in chosen.needs if needs] == expected
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-5)


class Entered(Method):
    """Notes at every forward in training whether what enters each block needs a gradient."""

    def apply(self, model, context):
        model = super().apply(model, context)
        self.needs = []
        model.register_forward_pre_hook(lambda *_: self.needs.append([]))
        for block in model.get_base_model().model.layers:
            block.register_forward_pre_hook(self.note)
        return model

    def note(self, block, args):
        if block.training:
            self.needs[-1].append(args[0].requires_grad)


# -- draws ----------------------------------------------------------------------------------------------------------


def test_every_n_occurs_about_equally_often_within_200_steps():
    counts = Counter(drawn())
    assert set(counts) == set(range(DEPTH))
    assert all(30 <= counts[n] <= 70 for n in counts)  # 50 of each are expected, with a deviation of 6
    assert set(drawn(max_drop=1)) == {0, 1}
    assert set(drawn(max_drop=0, steps=9)) == {0}


def test_draws_follow_from_the_seed_and_the_step_alone():
    random_state = torch.get_rng_state()
    first = drawn()
    torch.manual_seed(1)
    assert drawn() == first != drawn(seed=1)
    torch.set_rng_state(random_state)


def test_evaluation_is_deterministic_whatever_training_draws():
    model = randomised(method(eval_drop=1), tiny_llama)
    reference = logits(model.eval())
    for n in range(DEPTH):
        drop_in_training(model, n)
        assert torch.equal(logits(model.eval()), reference)
        assert torch.equal(logits(model.train()), reference) == (n == 1)


class Watched(Method):
    """Notes at every forward in training how many blocks rest, and which adapters a step moved."""

    def __init__(self, config):
        super().__init__(config)
        self.forwards, self.moved, self.evaluated = [], [], []

    def apply(self, model, context):
        model = super().apply(model, context)
        self.before = trained_tensors(model)
        model.register_forward_pre_hook(self.note)
        return model

    def note(self, model, *_):
        (n,) = {layer.training_drop for layer in layers(model).values()}
        if not model.training:
            self.evaluated.append(n)
            return
        now = trained_tensors(model)
        moved = {chosen_depth(name, tiny_llama) for name, old in self.before.items() if not torch.equal(old, now[name])}
        self.moved.append(moved)
        self.before = now
        self.forwards.append(n)


def watched(folder, checkpoint=False, reporter=None, **settings):
    chosen = Watched(Config(bottleneck=6))
    work = workload(folder, chosen, reporter=reporter, **{"max_steps": 8, "weight_decay": 0.1, **settings})
    model, _ = train(work, work.run.latest_checkpoint() if checkpoint else None)
    return chosen, model


def test_a_step_moves_only_adapters_that_did_not_rest_in_it_also_with_weight_decay(tmp_path):
    chosen, _ = watched(tmp_path)
    assert chosen.forwards == drawn(steps=8)
    assert len(set(chosen.forwards)) > 1
    assert chosen.moved[1:] == [set(range(n, DEPTH)) for n in chosen.forwards[:-1]]


def test_all_micro_batches_of_a_step_have_one_n(tmp_path):
    chosen, model = watched(tmp_path / "a", batch_size=2, gradient_accumulation=2)
    assert chosen.forwards == [n for n in drawn(steps=8) for _ in range(2)]
    _, straight = watched(tmp_path / "b", batch_size=4)
    for name, tensor in trained_tensors(straight).items():
        torch.testing.assert_close(trained_tensors(model)[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("stop", [1, 4])
def test_stopped_and_resumed_equals_straight_and_draws_alike(tmp_path, stop):
    first, straight = watched(tmp_path / "a")
    with pytest.raises(Interrupted):
        watched(tmp_path / "b", reporter=StopAt(stop))
    second, again = watched(tmp_path / "b", checkpoint=True)
    assert second.forwards == first.forwards[stop:]
    for name, tensor in trained_tensors(straight).items():
        assert torch.equal(trained_tensors(again)[name], tensor), name


def test_the_loss_falls_for_every_n():
    chosen = method()
    model = applied(chosen, tiny_llama())
    base = model(input_ids=IDS, labels=IDS).loss.item()
    for n in [0, 3, 1, 2] * 3:
        drop_in_training(model, n)
        run_steps(model, 1)
    for n in range(DEPTH):
        drop_in_training(model, n)
        with torch.no_grad():
            assert model.train()(input_ids=IDS, labels=IDS).loss.item() < base


# -- the count, and keys that don't fit -----------------------------------------------------------------------------


def test_count_on_smollm2s_shapes():
    model, one = tiny_of("llama", **SMOLLM2), 2 * 576 * 36 + 36 + 576
    assert method(bottleneck=36).count(model) == 30 * one == 1_262_520
    assert fixed(None, bottleneck=36).count(model) == 16 * one  # L / 2 - 1 = 14 have none
    assert fixed(5, bottleneck=36, placement="houlsby").count(model) == 2 * 25 * one
    assert fixed(5).count(tiny_of("bert", num_hidden_layers=12)) == 7 * (2 * 32 * 6 + 6 + 32)


@pytest.mark.parametrize("base", [tiny_t5, tiny_bart])
def test_of_an_encoder_decoder_the_encoders_blocks_come_first(base):
    assert all(name.split(".decoder.")[0] != name or name.startswith("decoder.") for name in layers_of(fixed(2), base))
    assert len(layers_of(fixed(3), base)) == 1
    assert len(layers_of(fixed(1, placement="houlsby"), base)) == 2 + 2 * 3


def layers_of(chosen, base):
    return list(layers(applied(chosen, base())))


def test_notices_say_what_has_no_adapter():
    assert fixed(1).notices(tiny_llama()) == ["the lowest 1 of 4 blocks have no adapter"]
    (line,) = method(eval_drop=2).notices(tiny_llama())
    assert line == "each step leaves out the adapters of the lowest 0 to 3 of 4 blocks, evaluation those of 2"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mode": "fixed", "drop": 4}, r"method\.drop: the model has 4 blocks, got 4; give at most 3"),
        ({"max_drop": 4}, r"method\.max_drop: the model has 4 blocks, got 4; give at most 3"),
        ({"eval_drop": 5}, r"method\.eval_drop: the model has 4 blocks, got 5; give at most 4"),
        ({"placement": "houlsby", "target_modules": ["lm_head"]}, r"lm_head is outside of the blocks"),
        ({"placement": "houlsby", "target_modules": ["embed_tokens"]}, "adapter_drop takes linear layers only"),
    ],
)
def test_more_than_the_model_has_is_refused(keys, message):
    with pytest.raises(UsageError, match=message):
        method(**keys).count(tiny_llama(tie=False))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"drop": 1}, "drop: mode: robust does not read it"),
        ({"mode": "fixed", "max_drop": 1}, "max_drop: mode: fixed does not read it"),
        ({"mode": "fixed", "eval_drop": 1}, "eval_drop: mode: fixed does not read it"),
        ({"eval_drop": -1}, "greater than or equal to 0"),
        ({"target_modules": ["o_proj"]}, "target_modules: linear layers are for placement: houlsby"),
    ],
)
def test_sections_that_can_not_work_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        recipe(Config(**keys))


def test_unknown_blocks_are_an_error_that_says_what_to_take():
    with pytest.raises(UsageError, match=r"take a variant behind linear layers, and give method\.target_modules"):
        method().count(tiny_of("mixtral"))
    chosen = method(placement="houlsby", target_modules=["o_proj"])
    assert chosen.count(tiny_of("mixtral")) == 2 * (2 * 32 * 6 + 6 + 32)


# -- the artefact ---------------------------------------------------------------------------------------------------


def saved(folder, chosen):
    base = save_tiny(folder / "base")
    exported = chosen.export(randomised(chosen, tiny_llama)).eval()
    exported.save_pretrained(folder / "adapter")
    path = folder / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return base, folder / "adapter", logits(exported), config


def test_in_another_process_one_import_makes_plain_peft_load_it(tmp_path):
    base, adapter, reference, config = saved(tmp_path, method(eval_drop=2))
    assert (config["peft_type"], config["drop"]) == ("PEFTCTL_ADAPTER_DROP", 2)
    arguments = [str(base), str(adapter), str(tmp_path / "logits.pt")]
    done = subprocess.run([sys.executable, "-c", PLAIN, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), reference)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_robust_artefact_answers_as_evaluated_and_for_any_other_n(tmp_path, placement):
    _, adapter, reference, config = saved(tmp_path, method(placement=placement, eval_drop=1))
    model, _ = load(str(adapter))
    assert torch.equal(logits(model), reference)
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"drop": 3}))
    other = PeftModel.from_pretrained(tiny_llama(), adapter).eval()
    assert torch.equal(logits(other), logits(randomised(method(placement=placement, eval_drop=3), tiny_llama)))
    model.load_adapter(str(adapter), "other")  # each of two in one model has its own n
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(other))
    model.set_adapter("default")
    assert torch.equal(logits(model), reference)
    assert torch.equal(logits(model.unload()), logits(tiny_llama()))


def test_a_fixed_artefact_is_a_plain_one_of_the_upper_blocks(tmp_path):
    _, adapter, reference, config = saved(tmp_path, fixed(3))
    assert (config["peft_type"], config["target_modules"]) == ("PEFTCTL_BOTTLENECK", ["3"])
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), adapter).eval()), reference)


@pytest.mark.parametrize("n", [0, 2])
def test_it_generates_with_a_cache_as_without(n):
    model = randomised(method(eval_drop=n), tiny_llama)
    keys = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    assert torch.equal(*(model.generate(input_ids=IDS, use_cache=cache, **keys) for cache in (True, False)))
