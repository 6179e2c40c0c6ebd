"""Stand-ins that let a model on the meta device be run without computing a number, for `step_bytes`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D


@contextmanager
def fake_tensors(model: nn.Module) -> Iterator[None]:
    """Put fake tensors of the CPU in the place of meta tensors: kernels and autocast are then chosen as in a run."""
    replaced: dict[int, Any] = {}
    places: list[tuple[dict[str, Any], str, Any]] = []
    # Real tensors (token ids, masks) may meet fake ones: code that looks into a mask then sees the true one.
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for holder in (module._parameters, module._buffers):
                for name, tensor in holder.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in replaced:  # tied weights stay tied
                        fake: Any = torch.empty(tensor.shape, dtype=tensor.dtype)
                        if isinstance(tensor, nn.Parameter):
                            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                        replaced[id(tensor)] = fake
                    places.append((holder, name, tensor))
    for holder, name, tensor in places:
        holder[name] = replaced[id(tensor)]
    try:
        yield
    finally:
        for holder, name, tensor in places:
            holder[name] = tensor


@contextmanager
def quantised_layers(model: nn.Module, stored: Mapping[str, int], compute: torch.dtype) -> Iterator[None]:
    """Let linear layers keep and make what bitsandbytes' layers do.

    Args:
        model: The model.
        stored: Names of the layers -> bits.
        compute: Type that 4-bit weights are multiplied in.
    """
    layers = {name: module for name, module in model.named_modules() if name in stored}

    def forward_of(module: Any, bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
        d_in, d_out = (
            (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
        )
        return lambda x: _Dequantised.apply(x.to(compute), (d_out, d_in), bits == 8).to(x.dtype)

    for name, module in layers.items():
        module.forward = forward_of(module, stored[name])  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in layers.values():
            del module.forward


class _Dequantised(torch.autograd.Function):
    """y = W x, with W widened for the product alone; 8-bit layers keep x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: tuple[int, int], keeps_input: bool) -> torch.Tensor:
        ctx.shape = shape
        ctx.save_for_backward(*([x] if keeps_input else []))
        return x @ x.new_empty(shape).t()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return upstream @ upstream.new_empty(ctx.shape), None, None


@contextmanager
def fused_dropout() -> Iterator[None]:
    """Drop as GPUs do: the mask is kept in bytes, not in the type of its input."""
    plain = nn.functional.dropout

    def fused(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p > 0 else input

    nn.functional.dropout = fused
    try:
        yield
    finally:
        nn.functional.dropout = plain
