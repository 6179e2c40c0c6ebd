"""S4: groups of blocks, equal parameters a block, what trains in each, and that nothing else does."""

import pytest
import torch

from peftctl.errors import Interrupted
from peftctl.methods.s4 import Config, Method, groups
from peftctl.tuners._parts import Part
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, recipe, run_steps
from tests.methods.test_houlsby import SMOLLM2
from tests.tiny import tiny_llama, tiny_opt, tiny_t5
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

IDS = torch.arange(1, 25).reshape(2, 12)
PAPER = [["adapter", "lora"], ["adapter", "prefix"], ["adapter", "prefix", "bias"], ["prefix", "bias", "lora"]]
KINDS = {"adapter": "bottleneck", "lora": "low_rank", "prefix": "prefix", "bias": "bias"}


def method(**keys):
    return Method(Config(**{"budget": 0.2, **keys}))


def deep(architecture="llama", device="cpu"):
    """Return twelve blocks: groups of 2, 4, 4 and 2."""
    return tiny_of(architecture, device, num_hidden_layers=12)


def logits(model, ids=IDS):
    inputs = {"decoder_input_ids": ids[:, :9]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def by_block(model, blocks):
    """Return of every block the kinds of its parts, and how many parameters they have."""
    kinds = [set() for _ in range(blocks)]
    sizes = [0] * blocks
    for name, module in model.named_modules():
        if isinstance(module, Part):
            number = int(name.split(".layers.")[1].split(".")[0])
            kinds[number].add(module.kind)
            sizes[number] += sum(p.numel() for p in module.parameters())
    return kinds, sizes


# -- groups and sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "sizes"),
    [(12, [2, 4, 4, 2]), (24, [4, 8, 8, 4]), (30, [5, 10, 10, 5]), (32, [5, 11, 11, 5]), (6, [1, 2, 2, 1])],
)
def test_groups_are_a_spindle_of_consecutive_blocks(blocks, sizes):
    found = groups(blocks)
    assert found == sorted(found) and [found.count(group) for group in range(4)] == sizes


@pytest.mark.parametrize("blocks", range(1, 40))
def test_every_block_is_in_one_group_and_the_middle_ones_are_the_largest(blocks):
    sizes = [groups(blocks).count(group) for group in range(4)]
    assert sum(sizes) == blocks
    if blocks > 7:
        assert 0 < sizes[0] < sizes[1] == sizes[2] > sizes[3] > 0


@pytest.mark.parametrize(("architecture", "has_biases"), [("opt", True), ("llama", False)])
def test_what_trains_in_a_block_is_the_papers_table(architecture, has_biases):
    kinds, sizes = by_block(applied(method(), deep(architecture)), 12)
    for group, found in zip(groups(12), kinds, strict=True):
        expected = {KINDS[strategy] for strategy in PAPER[group]}
        assert found == (expected if has_biases else expected - {"bias"})
    assert min(sizes) > 0


@pytest.mark.parametrize("architecture", ["opt", "llama"])
def test_every_block_has_the_same_number_up_to_the_coarsest_step_and_all_fit_the_budget(architecture):
    model = deep(architecture)
    total = sum(p.numel() for p in model.parameters())
    _, sizes = by_block(applied(method(), model), 12)
    room = 0.2 * total / 12
    # Steps of m, n and r: 2d + 1, kv rows of 2 * 16 or 2 * 32, and d_in + d_out of q and v; two or three in a block.
    assert all(0 <= room - size < 2 * 32 + 1 + 64 + 2 * 64 for size in sizes)


def test_on_smollm2_it_has_half_a_percent():
    model = tiny_of("llama", **SMOLLM2)
    chosen = Method(Config())
    room = 0.005 * 134_515_008 / 30
    rank, m_first = int(room / 2 // (576 + 576 + 576 + 192)), int((room / 2 - 576) // (2 * 576 + 1))
    tokens = int(room / 2 // (2 * 192))
    adapter = 2 * 576 * m_first + m_first + 576
    outer, inner = adapter + rank * 1920, adapter + tokens * 384
    last = tokens * 384 + rank * 1920
    assert chosen.count(model) == 5 * outer + 20 * inner + 5 * last
    assert 0.0045 < chosen.count(model) / 134_515_008 <= 0.005
    assert chosen.notices(model)[0] == f"group 1, 5 blocks: adapter m {m_first}, LoRA r {rank}"


def test_biases_take_what_there_is_and_the_rest_is_dealt_to_the_others():
    model = deep("opt")
    chosen = method()
    room = chosen._room(model, 12)
    block = chosen._blocks(model)[-1]
    assert block.group == 3 and sum(block.biases.values()) == 5 * 32 + 64 + 2 * 32
    size = chosen._sizes(block, room)
    share = (room - sum(block.biases.values())) / 2
    assert size.biases and (size.bottleneck, size.tokens, size.rank) == (0, int(share // 64), int(share // 128))


def test_a_budget_below_the_smallest_sizes_takes_these_and_says_so():
    model = deep()
    chosen = method(budget=1e-4)
    assert all("the budget is below the smallest sizes" in line for line in chosen.notices(model))
    assert not any("below" in line for line in method().notices(model))
    assert chosen.count(model) == sum(p.numel() for p in applied(chosen, model).parameters() if p.requires_grad) > 0


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, tiny_t5])
def test_count_is_what_trains(base):
    model = base()
    expected = method().count(model)
    assert sum(p.numel() for p in applied(method(), model).parameters() if p.requires_grad) == expected


def test_an_encoder_and_a_decoder_are_grouped_each_by_itself():
    blocks = method()._blocks(tiny_t5())
    assert [block.group for block in blocks] == groups(2) + groups(2)
    assert [len(block.attentions) for block in blocks] == [1, 1, 2, 2]


# -- the parts ------------------------------------------------------------------------------------------------------


def test_a_bias_is_the_bases_plus_what_was_learned():
    strategies = [["bias"]] * 4
    model = applied(method(strategies=strategies), tiny_opt()).eval()
    reference = tiny_opt()
    assert torch.equal(logits(model), logits(reference))
    generator = torch.Generator().manual_seed(0)
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, Part):
            module.union_parts["default"].shift.data.normal_(generator=generator)
            target = name.rpartition(".")[0]
            reference.get_submodule(target).bias.data += module.union_parts["default"].shift.data
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-5)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.endswith("union_parts.default.shift") for n in trained) and len(trained) == 2 * 8


def test_all_groups_have_gradients_and_nothing_frozen_moves():
    model = applied(method(), deep("opt"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = run_steps(model, 3)
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


def test_switched_off_it_is_the_base():
    model = applied(method(), deep("opt")).eval()
    run_steps(model, 2)
    model.eval()
    reference = logits(deep("opt"))
    assert not torch.allclose(logits(model), reference, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model), reference)


def test_nothing_leaks_from_later_tokens():
    model = applied(method(), deep("opt")).eval()
    run_steps(model, 2)
    model.eval()
    changed = IDS.clone()
    changed[:, 7:] = 40
    first, second = logits(model), logits(model, changed)
    torch.testing.assert_close(first[:, :7], second[:, :7], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(first[:, 7:], second[:, 7:], atol=1e-3)


def test_stopped_and_resumed_equals_straight(tmp_path):
    straight, _ = train(workload(tmp_path / "a", method(), max_steps=6))
    with pytest.raises(Interrupted):
        train(workload(tmp_path / "b", method(), max_steps=6, reporter=StopAt(4)))
    work = workload(tmp_path / "b", method(), max_steps=6)
    again, _ = train(work, work.run.latest_checkpoint())
    for name, tensor in trained_tensors(straight).items():
        assert torch.equal(trained_tensors(again)[name], tensor), name


def test_saved_and_loaded_it_answers_alike(tmp_path):
    from peft import PeftModel

    chosen = method()
    model = applied(chosen, deep("opt"))
    run_steps(model, 2)
    exported = chosen.export(model).eval()
    exported.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(deep("opt"), tmp_path).eval()
    assert torch.equal(logits(again), logits(exported))
    assert not torch.allclose(logits(again), logits(deep("opt")), atol=1e-4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"budget": 0}, "greater than 0"),
        ({"budget": 1}, "less than 1"),
        ({"strategies": [["adapter"]] * 3}, "expected four groups"),
        ({"strategies": [["adapter"], ["lora"], ["lora", "lora"], ["bias"]]}, "none twice"),
        ({"strategies": [["adapter"], ["lora"], [], ["bias"]]}, "one strategy or more"),
        ({"strategies": [["adapter"], ["lora"], ["dora"], ["bias"]]}, "'adapter', 'lora', 'prefix' or 'bias'"),
    ],
)
def test_sections_that_can_not_work_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        recipe(Config(**keys))
