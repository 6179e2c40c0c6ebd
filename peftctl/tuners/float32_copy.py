"""Train whole modules in float32 inside a model of a half type.

In bfloat16 an update of less than 1/256 of a weight is rounded away, and most are. The trained copy is therefore
float32, and its forward runs under autocast in the type of the model around it, which it gets back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.utils._pytree import tree_map


def widen_copies(model: nn.Module) -> None:
    """Turn every trained copy of a peft model to float32, in place."""
    for copy, dtype in _copies(model):
        for parameter in copy.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
        if dtype in (torch.bfloat16, torch.float16):
            copy.forward = functools.partial(_narrow, copy.forward, dtype)


def narrow_copies(model: nn.Module) -> None:
    """Turn every trained copy to the type of the module it replaces, which is how peft loads it again, in place."""
    for copy, dtype in _copies(model):
        vars(copy).pop("forward", None)
        for parameter in copy.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)


def _copies(model: nn.Module) -> Iterator[tuple[nn.Module, torch.dtype]]:
    """Yield the trained copies with the type of what they replace."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield module.modules_to_save["default"], next(module.original_module.parameters()).dtype


def _narrow(forward: Callable[..., Any], dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    device = next(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)).device.type
    with torch.autocast(device, dtype):
        result = forward(*args, **kwargs)
    return tree_map(lambda t: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t, result)
