"""Rotary positions: linear interpolation of Chen et al. 2023, and how far a model's positions reach."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from peftctl.models import rope
from tests.methods.architectures import tiny_of
from tests.tiny import tiny_bloom, tiny_llama, tiny_opt


def table(model, positions):
    """Return (cos, sin), (positions, d)."""
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.tensor([positions]))
    return cos[0], sin[0]


def stretch(model, factor):
    assert rope.set_rope(model, rope.stretched(model.config, factor))
    return model


def test_position_4p_with_factor_4_has_the_angles_of_p_exactly():
    positions = list(range(128))
    plain, long = tiny_llama(), stretch(tiny_llama(), 4.0)
    for found, expected in zip(table(long, [4 * p for p in positions]), table(plain, positions), strict=True):
        assert torch.equal(found, expected)
    assert (table(long, positions)[0] - table(plain, positions)[0]).abs().max() > 0.5


@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_the_model_is_the_one_that_such_a_configuration_makes(tmp_path, factor):
    tiny_llama().save_pretrained(tmp_path)
    parameters = {"rope_type": "linear", "factor": factor, "rope_theta": 10000.0}
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, rope_parameters=parameters)
    model, ids = stretch(tiny_llama(), factor), torch.arange(1, 41)[None]
    assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert not torch.allclose(model(input_ids=ids).logits, tiny_llama()(input_ids=ids).logits, atol=1e-2)
    assert model.config.rope_parameters == parameters
    assert model.config.max_position_embeddings == 512


@pytest.mark.parametrize("architecture", ["gpt_neox", "qwen2", "glm4", "mixtral"])
def test_in_other_architectures_it_is_the_configurations_too(architecture):
    plain, ids = tiny_of(architecture, "cpu"), torch.arange(1, 41)[None]
    parameters = rope.stretched(plain.config, 2.0)
    expected = tiny_of(architecture, "cpu", rope_parameters=dict(parameters))
    before = plain(input_ids=ids).logits
    assert rope.set_rope(plain, parameters)
    assert torch.equal(plain(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert not torch.equal(plain(input_ids=ids).logits, before)


def test_factors_multiply():
    twice, once = stretch(stretch(tiny_llama(), 2.0), 3.0), stretch(tiny_llama(), 6.0)
    assert twice.config.rope_parameters == once.config.rope_parameters
    assert torch.equal(table(twice, [5, 70])[0], table(once, [5, 70])[0])


def test_tables_stay_float32_on_their_device_and_no_buffer_is_new():
    before = {name: (b.dtype, b.device) for name, b in tiny_llama().named_buffers()}
    assert {n: (b.dtype, b.device) for n, b in stretch(tiny_llama(), 2.0).named_buffers()} == before
    bare = stretch(tiny_llama().to("meta"), 2.0)
    assert {b.device.type for b in bare.buffers()} == {"meta"}
    assert not any(module.training for module in stretch(tiny_llama(), 2.0).modules())


@pytest.mark.parametrize("rope_type", ["dynamic", "yarn", "llama3"])
def test_what_is_stretched_otherwise_can_not_be(rope_type):
    config = LlamaConfig()
    config.rope_parameters = {"rope_type": rope_type, "factor": 8.0, "rope_theta": 10000.0}
    assert rope.stretched(config, 2.0) is None
    assert rope.linear_factor(config) == 1.0


def test_other_positions_can_not_be():
    assert rope.stretched(tiny_opt().config, 2.0) is None
    assert not rope.set_rope(tiny_opt(), {"rope_type": "linear", "factor": 2.0})
    assert rope.stretched(tiny_of("phi3").config, 2.0) is None  # a merged model would not load
    nested = LlamaConfig()
    nested.rope_parameters = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    assert rope.stretched(nested, 2.0) is None


def test_reach():
    assert rope.reach(tiny_llama().config) == rope.reach(tiny_opt().config) == 512
    assert rope.reach(stretch(tiny_llama(), 2.5).config) == 1280
    assert rope.reach(tiny_bloom().config) is None
