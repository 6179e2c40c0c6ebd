"""Partial fine-tuning of the last k blocks."""

import pytest
import torch

from peftctl.errors import UsageError
from peftctl.methods.last_layers import Config, Method
from tests.methods.helpers import applied, context, run_steps
from tests.tiny import tiny_llama, tiny_opt

IDS = torch.arange(1, 13).reshape(1, 12)


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt])
def test_count_is_k_blocks(base):
    method = Method(Config(layers=2))
    model = applied(method, base())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == method.count(base())


def test_count_on_the_tiny_llama_by_hand():
    block = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32
    assert Method(Config(layers=3)).count(tiny_llama()) == 3 * block


def test_only_the_last_blocks_move():
    model = applied(Method(Config(layers=2)), tiny_llama())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run_steps(model, 3, weight_decay=0.1)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved and all(".layers.2." in n or ".layers.3." in n for n in moved)


def test_no_graph_below_the_first_trained_block():
    model = applied(Method(Config(layers=1)), tiny_llama()).train()
    seen = {}
    for i, block in enumerate(model.base_model.model.model.layers):
        block.register_forward_pre_hook(lambda m, args, i=i: seen.__setitem__(i, args[0].requires_grad))
    model(input_ids=IDS)
    assert seen == {0: False, 1: False, 2: False, 3: False}


def test_starts_as_the_base_and_disables_to_it():
    reference = tiny_llama()(input_ids=IDS).logits
    model = applied(Method(Config(layers=2)), tiny_llama())
    assert torch.equal(model.eval()(input_ids=IDS).logits, reference)
    run_steps(model, 2)
    with model.eval().disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, reference)


def test_all_blocks_equal_full_tuning_of_the_blocks_step_for_step():
    model = applied(Method(Config(layers=4)), tiny_llama())
    full = tiny_llama()
    full.requires_grad_(False)
    full.model.layers.requires_grad_(True)
    assert run_steps(model, 4) == pytest.approx(run_steps(full, 4), rel=1e-6)


def test_trained_copies_of_a_bfloat16_base_are_float32():
    model = applied(Method(Config(layers=1)), tiny_llama(dtype="bfloat16"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_more_layers_than_there_are_is_refused():
    with pytest.raises(UsageError, match="the model has 4 blocks, got 5"):
        Method(Config(layers=5)).apply(tiny_llama(), context())
