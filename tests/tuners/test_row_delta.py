"""The row-delta layer against the naive product; what it keeps for the backward pass, saves and merges."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from peftctl.tuners.row_delta import RowDeltaConfig, RowDeltaLayer, begin_anew, layers, place, rows_of
from tests.tiny import tiny_llama, tiny_opt

IDS = torch.arange(1, 25).reshape(2, 12)
D_IN, D_OUT = 7, 5


def linear(turned=False):
    torch.manual_seed(0)
    base = Conv1D(D_OUT, D_IN) if turned else nn.Linear(D_IN, D_OUT)
    nn.init.normal_(base.bias)
    return base.double().requires_grad_(False)


def layer_of(base, rows, columns=False, bias=True):
    """Return a layer with random changes of these rows, in float64."""
    layer = RowDeltaLayer(base, columns)
    layer.update_layer("default", len(rows), bias)
    layer.choose("default", torch.tensor(rows))
    generator = torch.Generator().manual_seed(1)
    for values in (*layer.delta_weight.values(), *layer.delta_bias.values()):
        values.data = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    return layer


def dense(layer, columns, turned):
    """Return (W + Δ) as (d_out, d_in), and b + β, by hand."""
    base = layer.get_base_layer()
    weight = (base.weight.T if turned else base.weight).clone()
    bias = base.bias.clone()
    for i, row in enumerate(layer.rows("default").tolist()):
        delta = layer.delta_weight["default"].detach()[i]
        if columns:
            weight[:, row] += delta
        else:
            weight[row] += delta
            bias[row] += layer.delta_bias["default"].detach()[i]
    return weight, bias


@pytest.mark.parametrize("turned", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("rows", [[1, 4], None], ids=["some", "all"])
def test_outputs_and_gradients_are_those_of_the_changed_matrix(turned, columns, rows):
    size = D_IN if columns else D_OUT
    rows = list(range(size)) if rows is None else rows
    layer = layer_of(linear(turned), rows, columns, bias=not columns)
    assert ("default" in layer.delta_rows) == (len(rows) < size)
    x = torch.randn(2, 3, D_IN, dtype=torch.float64, requires_grad=True)
    weight, bias = (t.requires_grad_() for t in dense(layer, columns, turned))
    naive = x.detach().clone().requires_grad_()
    expected = functional.linear(naive, weight, bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    layer(x).square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, naive.grad, rtol=1e-12, atol=1e-12)
    lines = weight.grad.T if columns else weight.grad
    torch.testing.assert_close(layer.delta_weight["default"].grad, lines[rows], rtol=1e-12, atol=1e-12)
    if not columns:
        torch.testing.assert_close(layer.delta_bias["default"].grad, bias.grad[rows], rtol=1e-12, atol=1e-12)
    assert layer.get_base_layer().weight.grad is None


@pytest.mark.parametrize("turned", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_merging_writes_these_rows_and_unmerging_puts_them_back_exactly(turned, columns):
    layer = layer_of(linear(turned), [0, 3], columns, bias=not columns)
    base = layer.get_base_layer()
    before = base.weight.clone(), base.bias.clone()
    x = torch.randn(4, D_IN, dtype=torch.float64)
    expected, (weight, bias) = layer(x), dense(layer, columns, turned)
    layer.merge(safe_merge=True)
    torch.testing.assert_close(base.weight.T if turned else base.weight, weight, rtol=0, atol=0)
    torch.testing.assert_close(base.bias, bias, rtol=0, atol=0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    layer.unmerge()
    assert torch.equal(base.weight, before[0]) and torch.equal(base.bias, before[1])
    assert torch.equal(layer(x), expected)


def test_a_change_that_is_not_finite_is_not_merged():
    layer = layer_of(linear(), [0, 3])
    before = layer.weight.clone()
    layer.delta_bias["default"].data[1] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before) and not layer.merged


def test_two_active_adapters_add_up_and_merge_and_leave_one_by_one():
    layer = layer_of(linear(), [1, 2])
    layer.update_layer("other", 1, False)
    layer.choose("other", torch.tensor([2]))
    layer.delta_weight["other"].data = torch.ones(1, D_IN).double()
    x = torch.randn(4, D_IN, dtype=torch.float64)
    one, before = layer(x), layer.weight.clone()
    layer.set_adapter(["default", "other"])
    both = layer(x)
    assert torch.equal(both[:, [0, 1, 3, 4]], one[:, [0, 1, 3, 4]])
    torch.testing.assert_close(both[:, 2], one[:, 2] + x.sum(1), rtol=1e-12, atol=1e-12)
    layer.merge()
    torch.testing.assert_close(layer(x), both, rtol=1e-12, atol=1e-12)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_no_gradient_and_nothing_kept_is_as_large_as_the_weight():
    base = nn.Linear(64, 48, bias=False).requires_grad_(False)
    layer = RowDeltaLayer(base)
    layer.update_layer("default", 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = layer(torch.randn(2, 64, requires_grad=True))
    out.sum().backward()
    large = [t for t in kept if t.numel() >= 64 * 48 and t.data_ptr() != base.weight.data_ptr()]
    assert kept and not large and base.weight.grad is None
    assert layer.delta_weight["default"].grad.shape == (4, 64)


def test_rows_that_stay_keep_their_values_and_others_begin_with_0():
    layer = layer_of(linear(), [1, 2, 4]).float()
    old, parameter = layer.delta_weight["default"].detach().clone(), layer.delta_weight["default"]
    layer.choose("default", torch.tensor([1, 2, 4]))
    assert layer.delta_weight["default"] is parameter
    layer.choose("default", torch.tensor([0, 2, 4]))
    new = layer.delta_weight["default"]
    assert new.requires_grad and new.is_leaf
    assert torch.equal(new[1:], old[1:]) and not new[0].any()
    layer.choose("default", torch.arange(D_OUT))
    assert "default" not in layer.delta_rows and torch.equal(layer.rows("default"), torch.arange(D_OUT).int())
    assert not layer.delta_weight["default"][[1, 3]].any()


# -- in a model -----------------------------------------------------------------------------------------------------

FC1, FC2 = "model.decoder.layers.0.fc1", "model.decoder.layers.1.fc2"


def adapted(base=None):
    """Return a tiny OPT with 5 rows of one layer, with biases, and 3 columns of another."""
    config = RowDeltaConfig(counts={FC1: 5, FC2: 3}, columns=[FC2], biases=[FC1], task_type="CAUSAL_LM")
    model = get_peft_model(base or tiny_opt(), config)
    place(model, {FC1: torch.tensor([0, 7, 8, 30, 63]), FC2: torch.tensor([1, 5, 60])})
    return model


def moved(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def test_it_begins_bit_equal_to_the_base_and_disabled_it_stays_so():
    base = tiny_opt()
    reference = base(input_ids=IDS).logits
    model = adapted(copy.deepcopy(base)).eval()
    assert torch.equal(model(input_ids=IDS).logits, reference)
    moved(model)
    assert not torch.equal(model(input_ids=IDS).logits, reference)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, reference)
    begin_anew(model)
    assert torch.equal(model(input_ids=IDS).logits, reference)


def test_what_is_saved_is_adapter_sized_has_the_index_and_answers_alike(tmp_path):
    from safetensors.torch import load_file

    model = moved(adapted())
    logits = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == 5 * (32 + 1 + 1) + 3 * (32 + 1)
    assert {tuple(t.shape) for name, t in tensors.items() if "rows" in name} == {(5,), (3,)}
    again = PeftModel.from_pretrained(tiny_opt(), tmp_path).eval()
    assert torch.equal(again(input_ids=IDS).logits, logits)
    assert not any(p.requires_grad for p in again.parameters())
    merged = again.merge_and_unload()
    assert {type(m).__name__ for m in merged.modules()}.isdisjoint({"RowDeltaLayer"})
    torch.testing.assert_close(merged(input_ids=IDS).logits, logits, rtol=1e-5, atol=1e-5)
    names = {name for name, p in tiny_opt().named_parameters() if not torch.equal(p, merged.get_parameter(name))}
    assert names == {f"{FC1}.weight", f"{FC1}.bias", f"{FC2}.weight"}


def test_layers_come_and_go_with_their_rows():
    model = moved(adapted())
    place(model, {FC2: torch.tensor([5, 61])})
    assert list(rows_of(model)) == [FC2]
    assert type(model.get_base_model().get_submodule(FC1)) is nn.Linear
    assert model.peft_config["default"].counts == {FC2: 2}
    place(model, {FC1: torch.tensor([3]), FC2: torch.tensor([5, 61])})
    found = dict(layers(model))
    assert model.peft_config["default"].counts == {FC1: 1, FC2: 2}
    assert found[FC1].delta_weight["default"].requires_grad and found[FC1].delta_bias["default"].shape == (1,)
    assert found[FC2].columns and not found[FC1].columns
    place(model, {name: torch.arange(layer.size) for name, layer in found.items()})
    assert all("default" not in layer.delta_rows for _, layer in layers(model))
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 3 and all(p.grad is not None for p in trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_over_a_half_type_the_change_stays_float32(dtype):
    model = adapted(tiny_opt().to(dtype))
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert moved(model)(input_ids=IDS).logits.dtype == dtype


def test_the_step_equals_that_of_the_rows_of_a_dense_model():
    """SGD on Δ is SGD on the rows of W."""
    name, rows = "model.layers.1.mlp.up_proj", torch.tensor([2, 9, 40])
    model = get_peft_model(tiny_llama().double(), RowDeltaConfig(counts={name: 3}, task_type="CAUSAL_LM"))
    place(model, {name: rows})
    (layer,) = dict(layers(model)).values()
    layer.delta_weight["default"].data = layer.delta_weight["default"].data.double()
    base = tiny_llama().double()
    for net in (model, base):
        net(input_ids=IDS, labels=IDS).loss.backward()
    expected = base.get_submodule(name).weight.grad[rows]
    torch.testing.assert_close(layer.delta_weight["default"].grad, expected, rtol=1e-9, atol=1e-12)
