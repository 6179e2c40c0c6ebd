"""MoV: where its vectors stand, what trains, and that they are never pulled towards 0."""

import pytest
import torch
from peft import IA3Config, get_peft_model

from peftctl.errors import UsageError
from peftctl.methods.mov import Config, Method
from peftctl.recipe.schema import TrainSection
from peftctl.training.optimizers import check_partition
from peftctl.tuners.routing import layers
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied
from tests.methods.routed import IDS, check_moves, check_quantised, check_resume, experts, randomise
from tests.methods.test_molora import SMOLLM2
from tests.tiny import tiny_bart, tiny_llama, tiny_opt, tiny_t5


def method(**keys):
    return Method(Config(**{"experts": 3, **keys}))


def logits(model, ids=IDS):
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, tiny_t5, tiny_bart])
def test_starts_as_the_base(base):
    reference = logits(base())
    model = applied(method(), base())
    for mode in (model.eval(), model.train()):
        assert (logits(mode) - reference).abs().max() <= 5e-7 * reference.abs().max()


def test_keys_and_values_are_scaled_behind_and_feed_forward_ends_before():
    model = applied(method(), tiny_llama())
    found = {name: (layer.scales_input, one.vectors.shape[1]) for (name, layer), one in zip(
        layers(model).items(), experts(model).values(), strict=True
    )}  # fmt: skip
    expected = {}
    for i in range(4):
        expected[f"model.layers.{i}.self_attn.k_proj"] = (False, 16)
        expected[f"model.layers.{i}.self_attn.v_proj"] = (False, 16)
        expected[f"model.layers.{i}.mlp.down_proj"] = (True, 64)
    assert found == expected
    assert all((one.vectors == 1).all() for one in experts(model).values())
    routers = torch.cat([one.router.flatten() for one in experts(model).values()])
    assert routers.std().item() == pytest.approx(0.02, rel=0.06)


def test_identical_vectors_are_ia3_through_the_whole_model():
    """Of peft, with the targets that MoV has and any routers."""
    model = randomise(applied(method(), tiny_llama().double()).double())
    config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    single = get_peft_model(tiny_llama().double(), config).double()
    for name, one in experts(model).items():
        one.vectors.data = one.vectors.data[:1].abs().expand_as(one.vectors).clone()
        same = single.get_base_model().get_submodule(name).ia3_l["default"]
        same.data = one.vectors.data[0].view_as(same)
    torch.testing.assert_close(logits(model), logits(single), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("base", "activations"), [
    (tiny_llama, 4 * (16 + 16 + 64)), (tiny_opt, 2 * (32 + 32 + 64)), (tiny_t5, 6 * 64 + 4 * 64),
])  # fmt: skip
def test_counts_are_those_of_the_formula(base, activations):
    assert method().count(base()) == 2 * 3 * activations
    model = applied(method(), base())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 3 * activations


def test_count_on_smollm2():
    assert Method(Config(experts=10)).count(tiny_of("llama", **SMOLLM2)) == 20 * 30 * (2 * 192 + 1536) == 20 * 57_600


def test_an_architecture_with_fused_keys_is_refused():
    with pytest.raises(UsageError, match="gpt2 architecture has no linear layers of their own for keys and values"):
        method().count(tiny_of("gpt2"))


def test_at_first_vectors_have_a_gradient_and_routers_have_none():
    model = applied(method(), tiny_llama())
    model(input_ids=IDS, labels=IDS).loss.backward()
    for one in experts(model).values():
        assert not one.router.grad.any() and one.vectors.grad.any()


def test_three_steps_move_vectors_and_routers_and_nothing_else():
    check_moves(applied(method(), tiny_llama()))


def test_vectors_never_decay_and_routers_do():
    chosen = method()
    model = applied(chosen, tiny_llama())
    groups = chosen.param_groups(model, TrainSection(output_dir="run", weight_decay=0.3))
    check_partition(model, groups)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {decay[id(one.vectors)] for one in experts(model).values()} == {0.0}
    assert {decay[id(one.router)] for one in experts(model).values()} == {0.3}


@pytest.mark.parametrize("bits", [4, 8])
def test_over_a_quantised_base(tmp_path, bits):
    check_quantised(tmp_path, method, bits)


def test_stopped_and_resumed_equals_straight(tmp_path):
    check_resume(tmp_path, method)


def test_switched_off_it_is_the_base_and_merging_is_refused():
    model = randomise(applied(method(), tiny_llama()))
    assert not torch.equal(logits(model), logits(tiny_llama()))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))
    with pytest.raises(NotImplementedError, match="no weight of the base can take them up"):
        model.merge_and_unload()
    assert not Method.card.mergeable and "every token" in Method.card.merge_note
