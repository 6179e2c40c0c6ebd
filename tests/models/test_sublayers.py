"""The tables of models/sublayers.py, shown on a tiny model of every architecture that is in them."""

import re

import pytest
import torch
from torch import nn

from peftctl.errors import UsageError
from peftctl.methods._targets import matched_modules
from peftctl.models import sublayers
from peftctl.models.anatomy import sublayer_ends
from tests.methods.architectures import tiny_of

IDS = torch.arange(1, 25).reshape(2, 12)
STREAM = sorted(sublayers._STREAM)
PARTS = sorted(sublayers._STREAM_PARTS)
NORMS = sorted(sublayers._NORMS)
VARIANTS = {
    "falcon-serial": ("falcon", {"parallel_attn": False, "alibi": True, "new_decoder_architecture": False}),
    "falcon-new": ("falcon", {"new_decoder_architecture": True}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "opt-post": ("opt", {"do_layer_norm_before": False}),
}
"""Architectures whose configuration changes the order within a block."""
FEED_FORWARDS = {
    "bart": ("fc1", "fc2"),
    "bert": ("intermediate.dense", "output.dense"),
    "bloom": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "distilbert": ("ffn.lin1", "ffn.lin2"),
    "falcon": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "glm": ("mlp.gate_up_proj", "mlp.down_proj"),
    "gpt2": ("mlp.c_fc", "mlp.c_proj"),
    "gpt_neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "gptj": ("mlp.fc_in", "mlp.fc_out"),
    "llama": ("mlp.gate_proj", "mlp.down_proj"),
    "mpt": ("ffn.up_proj", "ffn.down_proj"),
    "opt": ("fc1", "fc2"),
    "phi": ("mlp.fc1", "mlp.fc2"),
    "starcoder2": ("mlp.c_fc", "mlp.c_proj"),
    "t5": ("DenseReluDense.wi", "DenseReluDense.wo"),
    "umt5": ("DenseReluDense.wi_0", "DenseReluDense.wo"),
}
SAME = {
    "gpt_bigcode": "gpt2", "glm4": "glm", "phi3": "glm", "mt5": "umt5",
    **dict.fromkeys(("camembert", "electra", "roberta", "xlm-roberta"), "bert"),
}  # fmt: skip
"""Architecture -> one that calls the layers of its feed-forward parts the same; Llama where it is nowhere else."""


def made(name):
    architecture, changes = VARIANTS.get(name, (name, {}))
    model = tiny_of(architecture, "cpu", **changes)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # fresh models have biases of 0 and norms of 1, which would hide much
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1)
    return model


def ran(model, *names):
    """Run a model; return what modules read and returned, by name, in the order of their calls."""
    seen = {}

    def watch(name):
        def note(_, args, kwargs, out):
            read = args[0] if args else kwargs["hidden_states"]
            # Copies, since Falcon adds to what a layer returned in place.
            seen[name] = (read.clone(), (out[0] if isinstance(out, tuple) else out).clone())

        return note

    hooks = [model.get_submodule(n).register_forward_hook(watch(n), with_kwargs=True) for n in dict.fromkeys(names)]
    inputs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        model(input_ids=IDS, **inputs)
    for hook in hooks:
        hook.remove()
    return seen


def linear(model):
    return matched_modules(model, "all-linear")


def silence(model, names):
    """Let linear layers return 0."""
    for name in names:
        for parameter in model.get_submodule(name).parameters():
            parameter.data.zero_()


def ends_of(model):
    return sublayers.block_ends(model, linear(model))


def blocks_of(model, ends):
    """Return the block of every end: the numbered module that is, or is around, an end, but for T5's sublayers."""
    end = r"\.layer\.\d+" if model.config.model_type in PARTS else r"(\.[A-Za-z_.]+)?"
    return [re.fullmatch(rf"(.*\.\d+){end}", name)[1] for name in ends]


def test_every_architecture_of_the_tables_has_a_tiny_model_of_its_own():
    for name in [*STREAM, *PARTS, *NORMS]:
        assert tiny_of(name).config.model_type == name
    assert FEED_FORWARDS.keys() | SAME.keys() <= {*STREAM, *PARTS, *NORMS}


# -- where blocks end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*STREAM, *PARTS, *(name for name in VARIANTS if name != "opt-post")])
def test_what_ends_a_block_passes_the_stream_on_as_it_came_where_sublayers_return_nothing(name):
    model = made(name)
    ends = ends_of(model)
    assert not any(isinstance(model.get_submodule(end), nn.LayerNorm) for end in ends)
    found = sublayer_ends(model, linear(model))
    silence(model, [*found["attention"], *found["mlp"]])
    seen = ran(model, *ends)
    assert len(ends) == len(seen) == (4 if model.config.is_encoder_decoder else 2)
    for end in ends:  # a norm of its output would change it: norms have random scales here
        read, returned = seen[end]
        assert torch.equal(returned, read)
        assert read.std(-1).max() / read.std(-1).min() > 1.05, "a norm makes all tokens alike"


@pytest.mark.parametrize("name", [*STREAM, *PARTS, *NORMS, *VARIANTS])
def test_the_next_block_reads_what_ends_a_block(name):
    model = made(name)
    ends = ends_of(model)
    blocks = blocks_of(model, ends)
    seen = ran(model, *ends, *blocks)
    following = [pair for pair in zip(ends, blocks[1:], strict=False) if int(pair[1].rsplit(".", 1)[1]) > 0]
    assert len(following) == len(ends) // 2
    for end, block in following:
        assert torch.equal(seen[end][1], seen[block][0])


@pytest.mark.parametrize("name", [*NORMS, "opt-post"])
def test_the_norm_that_ends_a_block_reads_the_sum_of_stream_and_feed_forward_part(name):
    model = made(name)
    ends, parts = ends_of(model), sublayers.feed_forwards(model, linear(model))
    assert all(isinstance(model.get_submodule(end), nn.LayerNorm) for end in ends)
    assert len(set(ends)) == len(ends) == len(parts)
    seen = ran(model, *ends, *parts, *parts.values())
    for end, (last, first) in zip(ends, parts.items(), strict=True):
        expected = seen[first][0].flatten() + seen[last][1].flatten()  # OPT's feed-forward part reads a list of tokens
        torch.testing.assert_close(seen[end][0].flatten(), expected)
    silence(model, parts)
    seen = ran(model, *ends, *parts.values())
    for end, first in zip(ends, parts.values(), strict=True):
        assert torch.equal(seen[end][0].flatten(), seen[first][0].flatten())


@pytest.mark.parametrize("architecture", ["mixtral", "mamba"])
def test_ends_of_unknown_blocks_are_an_error_that_names_the_way_out(architecture):
    model = tiny_of(architecture)
    message = rf"the {architecture} architecture .* take a variant behind linear layers, and give method.target_modules"
    with pytest.raises(UsageError, match=message):
        ends_of(model)
    with pytest.raises(UsageError, match=rf"{architecture} architecture .* give method.target_modules: .*, among "):
        sublayers.feed_forwards(model, linear(model))


# -- feed-forward parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*STREAM, *PARTS, *NORMS, *VARIANTS])
def test_every_block_has_one_feed_forward_part_from_its_first_layer_to_its_last(name):
    model = made(name)
    kind = model.config.model_type
    first, last = FEED_FORWARDS.get(kind) or FEED_FORWARDS[SAME.get(kind, "llama")]
    parts = sublayers.feed_forwards(model, linear(model))
    blocks = blocks_of(model, ends_of(model))
    where = [block + (".layer.1" if "encoder" in block else ".layer.2") * (kind in PARTS) for block in blocks]
    assert parts == {f"{block}.{last}": f"{block}.{first}" for block in where}


@pytest.mark.parametrize("name", [*STREAM, *PARTS, *NORMS, *VARIANTS])
def test_a_feed_forward_part_is_a_function_of_what_its_first_layer_reads(name):
    model = made(name)
    parts = sublayers.feed_forwards(model, linear(model))
    seen = ran(model, *parts, *parts.values())
    for last, first in parts.items():
        whole = model.get_submodule(last.rpartition(".")[0])
        again = {}
        hook = model.get_submodule(last).register_forward_hook(lambda *call, again=again: again.update(out=call[2]))
        read = seen[first][0]
        with torch.no_grad():
            if first.rpartition(".")[0] != last.rpartition(".")[0]:  # BERT's has a module on either side
                around = model.get_submodule(first.rpartition(".")[0])
                whole(around(read), torch.zeros_like(read))
            elif name.startswith(("opt", "bart")):  # in the block itself
                block = whole
                block.fc2(block.activation_fn(block.fc1(read)))
            else:
                whole(*([read, torch.zeros_like(read)] if name in ("bloom", "mpt") else [read]))
        hook.remove()
        torch.testing.assert_close(again["out"], seen[last][1])


# -- depths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_decoders_blocks_lie_above_the_encoders(name):
    model = made(name)
    ends = [*ends_of(model), *sublayers.feed_forwards(model, linear(model))]
    found, count = sublayers.depths(model, linear(model), ends)
    stacks = [
        2 * ("decoder" in end.split(".")) + int(end.split("layers." if name == "bart" else "block.")[1][0])
        for end in ends
    ]
    assert [found[end] for end in ends] == stacks == [0, 1, 2, 3] * 2
    assert count == 4


def test_what_is_in_no_block_has_no_depth():
    model = made("llama")
    with pytest.raises(UsageError, match=r"method\.target_modules: lm_head is outside of the blocks"):
        sublayers.depths(model, linear(model), ["model.layers.1", "lm_head"])


def test_the_tenth_block_is_not_taken_for_the_first():
    model = tiny_of("llama", num_hidden_layers=11)
    found, _ = sublayers.depths(model, linear(model), ["model.layers.10", "model.layers.1", "model.layers.1.mlp"])
    assert found == {"model.layers.10": 10, "model.layers.1": 1, "model.layers.1.mlp": 1}
