"""LISA: which blocks train when, what the optimizer keeps of the others, and its limit, full fine-tuning."""

import json
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftctl
from peftctl.errors import Interrupted, UsageError
from peftctl.methods import full
from peftctl.methods.base import Callback, StepInfo
from peftctl.methods.lisa import Config, Method
from peftctl.training.optimizers import check_partition
from tests.commands.test_new_tokens import recipe_with_tokens
from tests.methods.helpers import applied, recipe
from tests.tiny import tiny_bart, tiny_bert, tiny_llama, tiny_opt, tiny_t5
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

IDS = torch.arange(1, 25).reshape(2, 12)
DEPTH = 4
"""Blocks of the tiny Llama."""


class Watched(Method):
    """Notes the model before and after every step, and what is held for it."""

    def __init__(self, config):
        super().__init__(config)
        self.steps = []

    def callbacks(self, model):
        return (Watch(self), *super().callbacks(model))


class Watch(Callback):
    """Comes before the draws: after a step it sees the blocks of that step."""

    def __init__(self, method):
        self.method = method

    def before_optimizer(self, info):
        named = dict(info.model.named_parameters())
        self.before = {name: p.detach().clone() for name, p in named.items()}
        self.gradients = {name for name, p in named.items() if p.grad is not None}

    def after_step(self, info):
        named = dict(info.model.named_parameters())
        moved = {name for name, p in named.items() if not torch.equal(p, self.before[name])}
        active = {name for name, p in named.items() if p.requires_grad}
        self.method.steps.append((active, moved, self.gradients))


def method(**keys):
    return Method(Config(**({"gamma": 1, "interval": 2} | keys)))


def watched(folder, *, reporter=None, checkpoint=None, train_keys=None, **keys):
    """Train a watched run; return (method, model)."""
    chosen = Watched(Config(**({"gamma": 1, "interval": 2} | keys)))
    settings = {"max_steps": 9, "weight_decay": 0.1, "save_steps": 100} | (train_keys or {})
    work = workload(folder, chosen, reporter=reporter, **settings)
    model, _ = train(work, work.run.latest_checkpoint() if checkpoint else None)
    return chosen, model


def blocks_of(names):
    """Return the numbers of the blocks that hold tensors of these names."""
    return {int(name.split(".")[2]) for name in names if name.startswith("model.layers.")}


def outside(model):
    return {name for name, _ in model.named_parameters() if not name.startswith("model.layers.")}


def drawn(chosen, model, number):
    chosen._draws = number
    return chosen._drawn(model)


def smollm2():
    """The demo model's shapes, without weights."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


# -- what moves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_between_draws_gamma_blocks_and_all_outside_of_them_move_and_nothing_else(tmp_path, gamma):
    """With weight decay 0.1, which would move a resting block that the optimizer still touched."""
    chosen, model = watched(tmp_path, gamma=gamma)
    assert len(chosen.steps) == 9
    for active, moved, gradients in chosen.steps:
        assert moved == active == gradients
        assert len(blocks_of(moved)) == gamma
        assert outside(model) <= moved
        for name, _ in model.named_parameters():
            if name.startswith("model.layers."):
                assert (name in moved) == (int(name.split(".")[2]) in blocks_of(moved))


def test_blocks_change_at_multiples_of_the_interval_only(tmp_path):
    chosen, _ = watched(tmp_path, interval=3)
    sets = [blocks_of(active) for active, _, _ in chosen.steps]
    assert [sets[i] == sets[i + 1] for i in range(8) if (i + 1) % 3] == [True] * 6
    assert len({tuple(s) for s in sets}) > 1
    assert sets[::3] == [set().union(*drawn(chosen, tiny_llama(), n)) for n in (1, 2, 3)]


def test_a_fraction_is_one_of_the_run_and_the_last_step_draws_nothing(tmp_path):
    chosen, _ = watched(tmp_path, interval=0.25, train_keys={"max_steps": 8, "logging_steps": 1})
    assert chosen._draws == 4
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"]: line["draws"] for line in lines if "draws" in line} == {2: 2, 4: 3, 6: 4}


def test_draws_count_optimizer_steps_under_accumulation(tmp_path):
    plain, _ = watched(tmp_path / "plain", train_keys={"max_steps": 6})
    twice, _ = watched(tmp_path / "twice", train_keys={"max_steps": 6, "batch_size": 2, "gradient_accumulation": 2})
    assert [active for active, _, _ in plain.steps] == [active for active, _, _ in twice.steps]
    assert plain._draws == twice._draws == 3


def test_the_model_starts_as_the_base():
    reference = tiny_llama()(input_ids=IDS).logits
    assert torch.equal(applied(method(), tiny_llama())(input_ids=IDS).logits, reference)


# -- draws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_every_block_is_drawn_with_frequency_gamma_over_depth(gamma):
    chosen, model = method(gamma=gamma), tiny_llama()
    applied(chosen, model)
    count, draws = Counter(), 2000
    for number in range(draws):
        (blocks,) = drawn(chosen, model, number)
        assert len(blocks) == gamma
        count.update(blocks)
    share = gamma / DEPTH
    sigma = (draws * share * (1 - share)) ** 0.5
    assert all(abs(count[block] - draws * share) <= 3 * sigma for block in range(DEPTH))


def test_draws_follow_from_the_seed_and_leave_torchs_random_state_alone():
    model = tiny_llama()
    sequences = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        chosen = method()
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        chosen._seed = seed
        sequences.append([drawn(chosen, model, number) for number in range(30)])
        assert torch.equal(torch.get_rng_state(), before)
    assert sequences[0] == sequences[1] != sequences[2]


@pytest.mark.parametrize("stop", [3, 4])  # within an interval, and where one ends
def test_stopped_and_resumed_has_the_same_draws_and_weights(tmp_path, stop):
    straight, model = watched(tmp_path / "straight")
    with pytest.raises(Interrupted):
        watched(tmp_path / "stopped", reporter=StopAt(stop))
    resumed, again = watched(tmp_path / "stopped", checkpoint=True)
    assert [active for active, _, _ in resumed.steps] == [active for active, _, _ in straight.steps[stop:]]
    expected = dict(model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in again.named_parameters())


def test_saved_draws_go_on_where_another_run_length_would_have_other_ones(tmp_path):
    """The number of draws is saved: a fraction of a run in other processes is another number of steps."""
    chosen = method()
    model = applied(chosen, tiny_llama())
    chosen.load_state_dict(model, {"draws": 7})
    assert all(p.requires_grad for p in model.parameters())
    assert chosen.state_dict(model) == {"draws": 7}
    (callback,) = chosen.callbacks(model)
    callback.stage_begins(StepInfo(1, 100, model, lambda parameters: None))
    assert blocks_of(trained_tensors(model)) == drawn(chosen, model, 7)[0]


# -- memory --------------------------------------------------------------------------------------------------------


def steps_with_an_optimizer(chosen, steps):
    """Train by hand; yield (model, optimizer) before each draw or the next step."""
    model = applied(chosen, tiny_llama()).train()
    chosen.enter(model, chosen.stages(recipe())[-1], None)
    optimizer = torch.optim.AdamW(chosen.param_groups(model, recipe(weight_decay=0.1).train), lr=1e-2)
    (callback,) = chosen.callbacks(model)

    def info(step):
        return StepInfo(step, steps, model, lambda gone: [optimizer.state.pop(p, None) for p in gone])

    callback.stage_begins(info(0))
    for step in range(1, steps + 1):
        model(input_ids=IDS, labels=IDS).loss.backward()
        held = {id(p) for p in model.parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        yield model, optimizer, held
        callback.after_step(info(step))


@pytest.mark.parametrize("gamma", [1, 3])
def test_optimizer_state_and_gradients_exist_for_what_trains_only(gamma):
    seen = set()
    for model, optimizer, gradients in steps_with_an_optimizer(method(gamma=gamma, interval=1), 12):
        active = {id(p) for p in model.parameters() if p.requires_grad}
        assert {id(p) for p in optimizer.state} == active == gradients
        seen |= blocks_of(trained_tensors(model))
    assert len(seen) > gamma  # without forgetting, state of all these would be there by now


def test_a_block_that_comes_back_starts_anew_and_one_that_stays_goes_on():
    model_state = {}
    ages = Counter()
    for model, optimizer, _ in steps_with_an_optimizer(method(gamma=2, interval=1), 12):
        active = blocks_of(trained_tensors(model))
        for block in range(DEPTH):
            ages[block] = ages[block] + 1 if block in active else 0
            for p in model.model.layers[block].parameters() if block in active else ():
                assert int(optimizer.state[p]["step"]) == ages[block]
        model_state = optimizer.state[model.model.embed_tokens.weight]
    assert int(model_state["step"]) == 12
    assert max(ages.values()) < 12


def test_the_run_keeps_state_for_what_trains_only_and_checkpoints_hold_every_block(tmp_path):
    from safetensors import safe_open

    chosen, model = watched(tmp_path, train_keys={"max_steps": 7, "save_steps": 7})
    folder = tmp_path / "checkpoints" / "checkpoint-7"
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    with safe_open(folder / "trainable.safetensors", "pt") as tensors:
        assert set(tensors.keys()) == {name for name, _ in model.named_parameters()}
    active, _, _ = chosen.steps[-1]
    assert len(saved["state"]) == len(active)
    assert sum(len(group["params"]) for group in saved["param_groups"]) == len(list(model.parameters()))


def test_every_block_has_groups_of_its_own_and_vectors_do_not_decay():
    chosen = method()
    model = applied(chosen, tiny_llama())
    chosen.enter(model, chosen.stages(recipe())[-1], None)
    groups = chosen.param_groups(model, recipe(weight_decay=0.1).train)
    assert len(groups) == 2 * DEPTH + 2
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        held = [names[id(p)] for p in group["params"]]
        assert len(blocks_of(held)) == (0 if "model.norm.weight" in held or "model.embed_tokens.weight" in held else 1)
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] == 0.1}
    check_partition(model, groups)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


# -- the limit -----------------------------------------------------------------------------------------------------


def test_all_blocks_at_once_are_full_fine_tuning_bit_for_bit(tmp_path):
    keys = {"max_steps": 7, "weight_decay": 0.1, "max_grad_norm": 0.5}
    ours, _ = train(workload(tmp_path / "lisa", method(gamma=DEPTH), **keys))
    theirs, _ = train(workload(tmp_path / "full", full.Method(full.Config()), **keys))
    expected = dict(theirs.named_parameters())
    assert [n for n, p in ours.named_parameters() if not torch.equal(p, expected[n])] == []
    assert [n for n, p in tiny_llama().named_parameters() if torch.equal(p, expected[n])] == []


# -- counts and architectures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "count"), [(1, 31_852_224), (2, 35_392_320), (30, 134_515_008)])
def test_counts_on_the_demo_model(gamma, count):
    """Embedding 28,311,552, final norm 576, a block 3,540,096."""
    base = smollm2()
    chosen = method(gamma=gamma)
    assert chosen.count(base) == count == 28_311_552 + 576 + gamma * 3_540_096
    model = chosen.apply(base, type("Run", (), {"recipe": recipe()}))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("make", [tiny_llama, tiny_opt, tiny_bert, tiny_t5, tiny_bart])
def test_what_trains_at_a_time_is_at_most_what_is_counted(make):
    """In T5 the first block of a stack is larger than the others: it holds the table of relative positions."""
    base = make()
    chosen = method()
    counted = chosen.count(base)
    model = applied(chosen, base)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == counted
    (callback,) = chosen.callbacks(model)
    sizes = set()
    for number in range(1, 12):
        chosen._draws = number
        callback.stage_begins(StepInfo(0, 1, model, lambda parameters: None))
        sizes.add(sum(p.numel() for p in model.parameters() if p.requires_grad))
        stacks = chosen._stacks(model)
        waking = [[all(p.requires_grad for p in block.parameters()) for block in stack] for stack in stacks]
        assert [sum(stack) for stack in waking] == [1] * len(stacks)
    assert max(sizes) == counted
    assert len(stacks) == (2 if base.config.is_encoder_decoder else 1)
    assert (len(sizes) > 1) == (make is tiny_t5)


def test_a_run_with_new_tokens_counts_what_trains_at_a_time_and_writes_a_whole_model(tmp_path):
    section = {"name": "lisa", "gamma": 1, "interval": 1}
    result = peftctl.train(recipe_with_tokens(tmp_path, section, train={"max_steps": 3}))
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    assert result.summary["trainable_parameters"] == (400 + 2) * 32 + 32 + block
    assert result.artefact.name == "model"
    model, tokenizer = peftctl.load(result.artefact)
    assert model.get_input_embeddings().weight.shape == (402, 32)
    assert tokenizer.convert_tokens_to_ids("<d>") == 401


def test_more_blocks_than_there_are_is_an_error():
    with pytest.raises(UsageError, match=r"^method\.gamma: the model has 4 blocks, got 5; lower it$"):
        method(gamma=5).count(tiny_llama())


@pytest.mark.parametrize("keys", [{"gamma": 0}, {"interval": 0}, {"interval": 1.5}])
def test_bad_values_are_refused(keys):
    with pytest.raises(ValueError):
        Config(**keys)


def test_tells_how_many_blocks_train():
    assert method(gamma=2).notices(tiny_llama()) == [
        "2 of 4 blocks train at a time, and all that is outside of the blocks"
    ]
    assert method().notices(tiny_t5())[0].startswith("1 of 2 + 2 blocks")


def test_asks_for_float32_master_weights_under_autocast():
    assert method().load_options().dtype == "float32"
    assert Method.autocast
