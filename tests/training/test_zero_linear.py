"""A linear layer for ZeRO-3: the same numbers as PyTorch's, and a weight that can be freed and gathered again."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

from peftctl.training import zero_linear


def gradients(linear, shape, bias, frozen, dtype=None):
    torch.manual_seed(0)
    x = torch.randn(*shape, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=not frozen)
    b = torch.randn(7, dtype=torch.float64, requires_grad=True) if bias else None
    if dtype:
        x, weight, b = (t if t is None else t.detach().float().requires_grad_(t.requires_grad) for t in (x, weight, b))
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        y = linear(x, weight, b)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    return [y, *(t.grad for t in (x, weight, b) if t is not None)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_output_and_gradients_are_those_of_pytorch(shape, bias, frozen, dtype):
    for ours, theirs in zip(
        gradients(zero_linear.linear, shape, bias, frozen, dtype),
        gradients(functional.linear, shape, bias, frozen, dtype),
        strict=True,
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=1e-12 if dtype is None else 1e-2, atol=1e-12)


def test_a_weight_is_freed_between_the_passes_and_a_frozen_one_keeps_no_input():
    layer = nn.Linear(5, 7, bias=False).requires_grad_(False)
    x = torch.randn(3, 5, requires_grad=True)
    zero_linear.install()
    try:
        hidden = x * 1  # not a leaf, so that it can go
        y = layer(hidden)
    finally:
        zero_linear.remove()
    assert nn.functional.linear is zero_linear._PLAIN
    weight, gone = layer.weight.data, weakref.ref(layer.weight.data.untyped_storage())
    whole, kept = weight.clone(), weakref.ref(hidden)
    del weight, hidden
    layer.weight.data = torch.empty(0)  # as DeepSpeed frees a gathered weight
    assert gone() is None and kept() is None
    layer.weight.data = whole
    y.sum().backward()
    torch.testing.assert_close(x.grad, whole.sum(0).expand(3, 5))
