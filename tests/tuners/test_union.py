"""One adapter of several parts: lists of parts by layer, second adapters, copies, and a base without a trace."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from peftctl.tuners._parts import Part
from peftctl.tuners.gates import Gate, Padding
from peftctl.tuners.union import UnionConfig
from tests.tiny import tiny_bert, tiny_llama

IDS = torch.arange(1, 25).reshape(2, 12)
PREFIX = {"tokens": 3, "heads": 2, "key_dim": 8, "value_dim": 8, "width": 32}
ADAPTER = {"bottleneck": 5, "activation": "relu", "placement": "around", "width": 32}
BEHIND = {"bottleneck": 5, "activation": "relu"}
GATE = {"over": "token", "std": None}


def by_layer():
    """Return other parts for other layers, some at one place, some inside of each other's."""
    return [
        {"part": "low_rank", "targets": ["layers.0.self_attn.q_proj", "layers.3.mlp.up_proj"], "settings": {"r": 2}},
        {"part": "low_rank", "targets": ["3.self_attn.q_proj"], "settings": {"r": 5, "scaling": 2}, "gate": GATE},
        {"part": "prefix", "targets": ["layers.2.self_attn", "layers.3.self_attn"], "settings": PREFIX},
        {"part": "bottleneck", "targets": ["layers.0", "layers.2"], "settings": ADAPTER, "gate": GATE},
        {"part": "bottleneck", "targets": ["layers.3.mlp.up_proj"], "settings": BEHIND},
    ]  # fmt: skip


def union(base=None, seed=0, parts=None):
    model = get_peft_model(base or tiny_llama(), UnionConfig(parts=parts or by_layer()))
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return model.eval()


def logits(model):
    with torch.no_grad():
        out = model(input_ids=IDS)
    return out.logits if "logits" in out else out.last_hidden_state


def test_every_layer_has_the_parts_of_its_list():
    model = union()
    found = {
        n.removeprefix("base_model.model.model.layers."): m for n, m in model.named_modules() if isinstance(m, Part)
    }
    assert set(found) == {
        "0.self_attn.q_proj.added_low_rank", "0.added_bottleneck", "2.self_attn.added_prefix", "2.added_bottleneck",
        "3.self_attn.q_proj.added_low_rank", "3.self_attn.added_prefix", "3.mlp.up_proj.added_low_rank",
        "3.mlp.up_proj.added_bottleneck",
    }  # fmt: skip
    assert found["3.self_attn.q_proj.added_low_rank"].union_parts["default"].change.a.shape == (5, 32)
    assert len([m for m in model.modules() if isinstance(m, Gate)]) == 3
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {n for n, _ in model.named_parameters() if ".union_parts." in n}


def test_each_part_counts_and_alone_it_is_what_it_is():
    model, reference = union(), logits(tiny_llama())
    whole, layers = logits(model), [m for m in model.modules() if isinstance(m, Part)]
    for layer in layers:
        layer.enable_adapters(False)
        assert not torch.allclose(logits(model), whole, atol=1e-4)
        layer.enable_adapters(True)
    for layer in layers:
        layer.enable_adapters(False)
    assert torch.equal(logits(model), reference)


def test_two_parts_at_one_layer_are_added_one_behind_the_other():
    model = union()
    layer = model.get_base_model().model.layers[3].mlp.up_proj
    x = torch.randn(2, 4, 32)
    low, adapter = (getattr(layer, f"added_{kind}").union_parts["default"] for kind in ("low_rank", "bottleneck"))
    y = x @ layer.weight.T + x @ low.change.a.T @ low.change.b.T
    change = adapter.change
    expected = y + torch.relu(y @ change.down.weight.T + change.down.bias) @ change.up.weight.T + change.up.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_two_of_a_kind_at_one_place_are_refused():
    part = {"part": "low_rank", "targets": ["q_proj"], "settings": {"r": 2}}
    with pytest.raises(ValueError, match=r"two of kind low_rank at model\.layers\.0\.self_attn\.q_proj"):
        union(parts=[part, part])


def test_saved_and_read_back_also_as_a_second_adapter(tmp_path):
    first, second = union(), union(seed=1)
    first.save_pretrained(tmp_path / "a")
    second.save_pretrained(tmp_path / "b")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a").eval()
    assert torch.equal(logits(model), logits(first))
    assert not any(p.requires_grad for p in model.parameters())
    model.load_adapter(str(tmp_path / "b"), "other")
    assert torch.equal(logits(model), logits(first))
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(second))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(NotImplementedError, match="one at a time"):
        logits(model)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), logits(first))


def test_unloaded_nothing_is_left(tmp_path):
    plain = tiny_llama()
    keys = list(plain.state_dict())
    model = union(plain)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    for each in (twin, model):
        bare = each.unload()
        assert list(bare.state_dict()) == keys
        assert torch.equal(logits(bare), logits(tiny_llama()))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in bare.modules())


def test_gates_of_one_encoder_share_what_it_knows_of_padding():
    mean = {"over": "mean", "std": None}
    parts = [{"part": "low_rank", "targets": ["query", "value"], "settings": {"r": 2}, "gate": mean}]
    model = union(tiny_bert(), parts=parts)
    gates = [m for m in model.modules() if isinstance(m, Gate)]
    assert len(gates) == 4 and len({id(g.padding) for g in gates}) == 1
    twin = copy.deepcopy(model)
    copied = {id(m.padding) for m in twin.modules() if isinstance(m, Gate)}
    assert len(copied) == 1 and copied != {id(gates[0].padding)}
    mask = (torch.arange(12) < 7).long().expand(2, 12)
    with torch.no_grad():
        twin(input_ids=IDS, attention_mask=mask)
    assert gates[0].padding.real is None
    bare = model.unload()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bare.modules())


@pytest.mark.parametrize("kind", ["rows", "bool", "float", "none"])
def test_padding_is_read_off_any_mask(kind):
    class Stack(torch.nn.Module):
        def forward(self, states, attention_mask=None):
            return states

    rows = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    seen = rows.bool()[:, None, None].expand(2, 1, 4, 4)
    mask = {"rows": rows, "bool": seen, "float": torch.zeros(2, 1, 4, 4).masked_fill(~seen, -1e30), "none": None}[kind]
    padding, stack = Padding(), Stack()
    stack.register_forward_pre_hook(padding.remember, with_kwargs=True)
    for call in (lambda: stack(torch.zeros(2, 4, 8), mask), lambda: stack(torch.zeros(2, 4, 8), attention_mask=mask)):
        call()
        assert padding.real is None if mask is None else torch.equal(padding.real, rows.bool())
