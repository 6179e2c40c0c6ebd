"""Where a model attends: names, kinds and shapes, with and without weights, and that looking changes nothing."""

import pytest
import torch

from peftctl.models.attentions import Attention, attentions, stack_of
from tests.methods.architectures import tiny_of
from tests.tiny import tiny_bart, tiny_bert, tiny_llama, tiny_opt, tiny_t5

IDS = torch.arange(1, 25).reshape(2, 12)


def gpt2():
    return tiny_of("gpt2", "cpu")


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (tiny_llama, {f"model.layers.{i}.self_attn": ("decoder", "model", 2) for i in range(4)}),
        (tiny_opt, {f"model.decoder.layers.{i}.self_attn": ("decoder", "model.decoder", 4) for i in range(2)}),
        (gpt2, {f"transformer.h.{i}.attn": ("decoder", "transformer", 4) for i in range(2)}),
        (tiny_bert, {f"encoder.layer.{i}.attention.self": ("encoder", "encoder", 4) for i in range(2)}),
        (
            tiny_t5,
            {f"encoder.block.{i}.layer.0.SelfAttention": ("encoder", "encoder", 4) for i in range(2)}
            | {f"decoder.block.{i}.layer.0.SelfAttention": ("decoder", "decoder", 4) for i in range(2)}
            | {f"decoder.block.{i}.layer.1.EncDecAttention": ("cross", "decoder", 4) for i in range(2)},
        ),
        (
            tiny_bart,
            {f"model.encoder.layers.{i}.self_attn": ("encoder", "model.encoder", 4) for i in range(2)}
            | {f"model.decoder.layers.{i}.self_attn": ("decoder", "model.decoder", 4) for i in range(2)}
            | {f"model.decoder.layers.{i}.encoder_attn": ("cross", "model.decoder", 4) for i in range(2)},
        ),
    ],
)
def test_every_module_that_attends_is_found(base, expected, device):
    found = attentions(base().to(device))
    assert {layer.name: (layer.kind, layer.stack, layer.heads) for layer in found} == expected
    assert {(layer.key_dim, layer.value_dim, layer.row) for layer in found} == {(8, 8, found[0].heads * 16)}


@pytest.mark.parametrize("architecture", ["qwen2", "mistral", "gemma2", "phi3", "glm4", "gpt_neox", "gpt_bigcode"])
def test_further_architectures(architecture):
    found = attentions(tiny_of(architecture))
    assert len(found) == 2 and {layer.kind for layer in found} == {"decoder"}


def test_looking_changes_nothing():
    model = tiny_llama().train()
    before, state = model.config.to_dict(), torch.get_rng_state()
    with torch.no_grad():
        reference = model(input_ids=IDS).logits
        attentions(model)
        assert torch.equal(model(input_ids=IDS).logits, reference)
    assert model.config.to_dict() == before and model.config._attn_implementation == "sdpa"
    assert torch.equal(torch.get_rng_state(), state) and model.training


def test_the_stack_holds_the_outermost_list():
    model = tiny_t5()
    assert stack_of(model, "decoder.block.1.layer.2.DenseReluDense.wo") == "decoder"
    assert stack_of(model, "decoder.block.1") == "decoder"
    assert Attention("x", "cross", "y", 2, 8, 6).row == 28
