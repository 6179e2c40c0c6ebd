"""The side network: its equation, its gates, and how its blocks are cut out of the base's."""

import pytest
import torch

from peftctl.errors import RunError
from peftctl.methods.ladder_side_tuning import Config, Method
from peftctl.tuners.ladder_pruning import fill, fisher, largest, the_end
from peftctl.tuners.ladder_side import Call
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied
from tests.tiny import tiny_llama, tiny_opt

IDS = torch.arange(1, 25).reshape(2, 12)
ARCHITECTURES = ["llama", "qwen2", "gemma2", "phi3", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "opt"]


def ladder(base, **keys):
    return applied(Method(Config(**{"reduction": 4, "every": 1, "init": "random", **keys})), base).eval()


def side_of(model):
    return the_end(model).ladder_side["default"]


def live(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in side_of(model).parameters():
        p.data = (0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)
    return model


# -- the equation ---------------------------------------------------------------------------------------------------


def rms(x, weight):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def rotated(x, position, theta=10000.0):
    """Rotate one head's vector, (p,), by hand."""
    half = len(x) // 2
    angles = position / theta ** (2 * torch.arange(half, dtype=torch.float64) / len(x))
    first, second = x[:half], x[half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()])


def naive_block(s, block):
    """Return a Llama block with one head of 8 over states of one row, (seq, d_s)."""
    x = rms(s, block.input_layernorm.weight)
    a, queries, keys = block.self_attn, [], []
    for t, row in enumerate(x):
        queries.append(rotated(a.q_proj.weight @ row, t))
        keys.append(rotated(a.k_proj.weight @ row, t))
    values = x @ a.v_proj.weight.T
    out = []
    for t, q in enumerate(queries):
        scores = torch.stack([q @ k for k in keys[: t + 1]]) / 8**0.5
        out.append(a.o_proj.weight @ (scores.softmax(0) @ values[: t + 1]))
    s = s + torch.stack(out)
    y = rms(s, block.post_attention_layernorm.weight)
    gate, up = y @ block.mlp.gate_proj.weight.T, y @ block.mlp.up_proj.weight.T
    return s + (gate * torch.sigmoid(gate) * up) @ block.mlp.down_proj.weight.T


@pytest.mark.parametrize("merge_last", [True, False])
def test_the_whole_is_the_papers_equation_in_float64(merge_last):
    temperature = 0.7
    base = tiny_llama().double()
    model = live(ladder(base, every=2, merge_last=merge_last, gate_temperature=temperature).double())
    side = side_of(model)
    with torch.no_grad():
        h = tiny_llama().double()(input_ids=IDS[:1], output_hidden_states=True).hidden_states
        # h[i + 1] is what block i returns, but for the last one, which the library hands over behind the norm.
        states = {1: h[2][0]}
        bare = tiny_llama().double().model
        bare.layers[3].register_forward_hook(lambda _, args, out: states.update({3: out[0]}))
        last = bare(input_ids=IDS[:1]).last_hidden_state[0]
        s = h[0][0] @ side.down.weight.T + side.down.bias
        for rung, i in zip(side.rungs, [1, 3], strict=True):
            mu = 1 / (1 + torch.exp(-rung.gate / temperature))
            s = mu * s + (1 - mu) * (states[i] @ rung.down.weight.T + rung.down.bias)
            s = naive_block(s, rung.block)
        y = rms(s, side.norm.weight) @ side.up.weight.T + side.up.bias
        expected = (last + y if merge_last else y) @ base.get_input_embeddings().weight.T
        found = model(input_ids=IDS[:1]).logits[0]
    # The library's norms and angles are float32 in any model.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_gates_start_at_one_half():
    assert all(rung.mu().item() == 0.5 for rung in side_of(ladder(tiny_llama())).rungs)


@pytest.mark.parametrize("reads", ["states", "side"])
def test_an_open_gate_reads_the_side_alone_and_a_closed_one_the_base_alone(reads):
    model = live(ladder(tiny_llama().double()).double())
    end, side = the_end(model), side_of(model)
    kept = {}
    end.register_forward_pre_hook(lambda *_: kept.update(entry=end.entry, calls=end.calls))
    with torch.no_grad():
        model(input_ids=IDS)
        for rung in side.rungs:
            rung.gate.fill_(1e3 if reads == "side" else -1e3)
        entry, calls = kept["entry"], kept["calls"]
        assert sorted(calls) == [0, 1, 2, 3]
        start = side(entry, calls)
        noisy = {i: Call(torch.randn_like(c.h), c.args, c.kwargs) for i, c in calls.items()}
        other = Call(torch.randn_like(entry.h), entry.args, entry.kwargs)
        assert torch.equal(side(entry, noisy), start) == (reads == "side")
        assert torch.equal(side(other, calls), start) == (reads == "states")
        # What earlier rungs read has no part either: the last one forgets the state that they made.
        assert torch.equal(side(entry, {**noisy, 3: calls[3]}), start)


# -- cut out of the base --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_of_full_width_are_the_bases(architecture):
    model = ladder(tiny_of(architecture, "cpu"), reduction=1)
    fill(model)
    end = the_end(model)
    for block, rung in zip(end.stack.block_list(model.get_base_model()), side_of(model).rungs, strict=True):
        for name, p in block.named_parameters():
            assert torch.equal(rung.block.get_parameter(name), p), name
    assert torch.equal(side_of(model).norm.weight, end.base_layer.weight)


def strengthened(base, stream, inner, heads):
    """Scale what should be kept of a tiny Llama up, so that every way to score chooses it."""
    with torch.no_grad():
        for layer in base.model.layers:
            a, m = layer.self_attn, layer.mlp
            for matrix in (a.q_proj, a.k_proj, a.v_proj, m.gate_proj, m.up_proj):
                matrix.weight[:, stream] *= 30
            for matrix in (a.o_proj, m.down_proj):
                matrix.weight[stream] *= 30
            m.down_proj.weight[:, inner] *= 30
            for head in heads:
                a.o_proj.weight[:, 8 * head : 8 * head + 8] *= 30
    return base


def test_a_block_has_the_same_dimensions_throughout_and_whole_heads():
    stream, inner = torch.tensor([1, 4, 5, 11, 17, 20, 30, 31]), torch.arange(3, 64, 4)
    base = strengthened(tiny_llama(), stream, inner, [2])
    model = ladder(base)
    fill(model)
    for layer, rung in zip(base.model.layers, side_of(model).rungs, strict=True):
        a, m, small, narrow = layer.self_attn, layer.mlp, rung.block.self_attn, rung.block.mlp
        # Head 2 reads the keys and values of group 1.
        assert torch.equal(small.q_proj.weight, a.q_proj.weight[16:24][:, stream])
        assert torch.equal(small.k_proj.weight, a.k_proj.weight[8:16][:, stream])
        assert torch.equal(small.v_proj.weight, a.v_proj.weight[8:16][:, stream])
        assert torch.equal(small.o_proj.weight, a.o_proj.weight[stream][:, 16:24])
        assert torch.equal(narrow.gate_proj.weight, m.gate_proj.weight[inner][:, stream])
        assert torch.equal(narrow.up_proj.weight, m.up_proj.weight[inner][:, stream])
        assert torch.equal(narrow.down_proj.weight, m.down_proj.weight[stream][:, inner])
        assert torch.equal(rung.block.input_layernorm.weight, layer.input_layernorm.weight[stream])


def test_fused_projections_are_cut_part_by_part_and_with_their_biases():
    base = tiny_of("gpt2", "cpu")
    for p in base.parameters():
        torch.nn.init.normal_(p)
    model = ladder(base, reduction=2)  # two heads of 8 out of four
    fill(model)
    for layer, rung in zip(base.transformer.h, side_of(model).rungs, strict=True):
        wide, small = layer.attn.c_attn, rung.block.attn.c_attn
        chosen = [(wide.bias[None] == b).nonzero()[0, 1].item() for b in small.bias]
        q, k, v = (torch.tensor(chosen[16 * i : 16 * i + 16]) - 32 * i for i in range(3))
        assert torch.equal(q, k) and torch.equal(q, v) and sorted(set((q // 8).tolist())) == (q[::8] // 8).tolist()
        rows = [(layer.attn.c_proj.bias == b).nonzero().item() for b in rung.block.attn.c_proj.bias]
        assert torch.equal(rung.block.attn.c_proj.weight, layer.attn.c_proj.weight[q][:, rows])
        assert torch.equal(small.weight, wide.weight[rows][:, chosen])


def test_fisher_sums_are_those_of_squared_gradients_row_by_row():
    model = ladder(tiny_llama(), every=2)
    rows = [
        {"input_ids": IDS[i : i + 1], "attention_mask": torch.ones(1, 12), "labels": IDS[i : i + 1]} for i in (0, 1)
    ]
    model.train()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    found = fisher(model, rows)
    assert model.training and trained == [n for n, p in model.named_parameters() if p.requires_grad]
    assert not any(p.grad is not None for p in model.parameters())
    base = tiny_llama()
    expected = {}
    for row in rows:
        base.zero_grad()
        (base(**row).loss * 11).backward()
        for i in (1, 3):
            for name, p in base.model.layers[i].named_parameters():
                expected[i, name] = expected.get((i, name), 0) + p.grad.square() / 2
    assert sorted(found) == [1, 3]
    for (i, name), square in expected.items():
        sums = [square.sum(1), square.sum(0)] if square.ndim == 2 else [square]
        for got, wanted in zip(found[i][name], sums, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)


def test_fisher_chooses_what_gradients_say_where_magnitudes_say_another_thing():
    base = tiny_llama()
    model = ladder(base)
    scores = fisher(model, [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}])
    fill(model, scores)
    by_fisher = side_of(model).rungs[0].block.mlp.down_proj.weight.clone()
    stream = sum(
        sums[axis]
        for block in scores.values()
        for name, sums in block.items()
        for axis in range(len(sums))
        if len(sums[axis]) == 32
        and ("norm" in name or (axis == 0) == ("o_proj" in name or "down" in name))
        and not ("q_proj" in name and axis == 0)
    )
    rows = stream.sort(descending=True).indices[:8].sort().values
    down = base.model.layers[0].mlp.down_proj.weight
    inner = sum(scores[0][f"mlp.{n}_proj.weight"][axis] for n, axis in (("gate", 0), ("up", 0), ("down", 1)))
    columns = inner.sort(descending=True).indices[:16].sort().values
    assert torch.equal(by_fisher, down[rows][:, columns])
    fill(model)
    assert not torch.equal(side_of(model).rungs[0].block.mlp.down_proj.weight, by_fisher)


def test_no_rows_or_gradients_that_are_not_finite_are_an_error():
    model = ladder(tiny_opt())
    with pytest.raises(RunError, match="there is no training row"):
        fisher(model, [])
    with torch.no_grad():
        model.get_base_model().model.decoder.layers[1].fc1.weight[0, 0] = float("nan")
    with pytest.raises(RunError, match="is not finite"):
        fisher(model, [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}])


def test_largest_takes_the_first_of_equals_in_order():
    assert largest(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]
