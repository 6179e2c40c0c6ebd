"""A frozen linear layer with its LoRA as one operation."""

import pytest
import torch
from torch import nn

from peftctl.tuners.lora_products import LoraProducts, fits

SCALE = 1.7


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors(bias, trains=(True, True, True)):
    x, a, b = normal(2, 5, 6, seed=0), normal(3, 6, seed=1), normal(4, 3, seed=2)
    for tensor, wanted in zip((x, a, b), trains, strict=True):
        tensor.requires_grad_(wanted)
    return x, a, b, normal(4, 6, seed=3), normal(4, seed=4) if bias else None


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_equation_and_so_are_its_gradients(bias):
    x, a, b, weight, offset = tensors(bias)
    y = LoraProducts.apply(x, a, b, SCALE, weight, offset)
    expected = torch.einsum("nti,oi->nto", x, weight + SCALE * b @ a) + (offset if bias else 0.0)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    g = normal(2, 5, 4, seed=5)
    found = torch.autograd.grad(y, (x, a, b), g)
    for one, other in zip(found, torch.autograd.grad(expected, (x, a, b), g), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "trains", [(False, True, True), (True, False, True), (True, True, False), (True, False, False)]
)
def test_only_what_trains_gets_a_gradient(trains):
    x, a, b, weight, offset = tensors(True, trains)
    LoraProducts.apply(x, a, b, SCALE, weight, offset).sum().backward()
    assert tuple(tensor.grad is not None for tensor in (x, a, b)) == trains


def test_factors_of_a_wider_type_are_cast_to_that_of_the_input():
    x, a, b, weight, _ = tensors(False)
    x, weight = x.detach().bfloat16().requires_grad_(), weight.bfloat16()
    a, b = (factor.detach().float().requires_grad_() for factor in (a, b))
    y = LoraProducts.apply(x, a, b, SCALE, weight, None)
    found = torch.autograd.grad(y.sum(), (x, a, b))
    assert [y.dtype, *(tensor.dtype for tensor in found)] == [torch.bfloat16] * 2 + [torch.float32] * 2
    exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
    expected = exact[0] @ (weight.double() + SCALE * exact[2] @ exact[1]).T
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.1)
    for one, other in zip(found, torch.autograd.grad(expected.sum(), exact), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0.02, atol=0.1)


def test_finite_differences_agree():
    x, a, b, weight, offset = tensors(True)
    assert torch.autograd.gradcheck(LoraProducts.apply, (x, a, b, SCALE, weight, offset))


def test_it_keeps_the_input_and_what_has_the_rank_only():
    x, a, b, weight, offset = tensors(True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        LoraProducts.apply(x, a, b, SCALE, weight, offset)
    known = {tensor.data_ptr() for tensor in (x, a, b, weight)}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in known] == [(10, 3)]


def frozen(**keys):
    return nn.Linear(6, 4, **keys).requires_grad_(False)


def test_which_layers_it_serves():
    class Other(nn.Linear):
        pass

    assert fits(frozen(), torch.float32)
    assert fits(frozen(bias=False), torch.float32)
    assert not fits(frozen(), torch.bfloat16)
    assert not fits(nn.Linear(6, 4), torch.float32)
    assert not fits(Other(6, 4).requires_grad_(False), torch.float32)
    for register in (
        "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ):  # fmt: skip
        watched = frozen()
        getattr(watched, register)(lambda *_: None)
        assert not fits(watched, torch.float32)
