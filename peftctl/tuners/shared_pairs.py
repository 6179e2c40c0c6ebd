"""Several LoRA layers with one A and one B, and the beginning anew of all that trains.

    y_l = W_l x + s_l B A x   for every layer l of a group of equal kind and shape

The layers of a group hold the same two modules, so the gradient of the pair is the sum of theirs, an optimizer sees it
once, and it has the name of the first layer's. An adapter file has a copy for every layer: see `separate`.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from peftctl.tuners.fixed_factors import factor_parameters, layers

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def kinds(model: nn.Module) -> dict[str, list[str]]:
    """Return kind -> names of the layers that may share a pair, both in the model's order.

    A kind is a name without numbers, e.g. `layers.*.self_attn.q_proj`, with the shapes of its A and B where one name
    stands for several.
    """
    found: dict[tuple[str, tuple[tuple[int, ...], ...]], list[str]] = {}
    for name, layer in layers(model):
        shapes = tuple(tuple(p.shape) for p in factor_parameters(layer))
        found.setdefault((_NUMBER.sub("*", name), shapes), []).append(name)
    bare = [kind for kind, _ in found]
    return {
        kind if bare.count(kind) == 1 else f"{kind} {' '.join(map(str, shapes))}": names
        for (kind, shapes), names in found.items()
    }


def share(model: nn.Module, groups: Iterable[Sequence[str]]) -> None:
    """Let the layers of every group have the A and B of its first one, in place; those of other layers are their own.

    Args:
        model: With one adapter.
        groups: Names of layers of one kind.
    """
    separate(model)
    named = dict(layers(model))
    for first, *others in groups:
        for name in others:
            for factors in ("lora_A", "lora_B"):
                getattr(named[name], factors)["default"] = getattr(named[first], factors)["default"]


def separate(model: nn.Module) -> None:
    """Give every layer an A and a B of its own, with the values that it has, in place."""
    seen: set[int] = set()
    for _, layer in layers(model):
        for factors in (layer.lora_A, layer.lora_B):
            if id(factors["default"]) in seen:
                factors["default"] = copy.deepcopy(factors["default"])
            seen.add(id(factors["default"]))


def begin_anew(model: nn.Module, generator: torch.Generator) -> None:
    """Put all that trains back to a start, in place: A is drawn, on the CPU on any device, B is zero, all else is W's.

    Args:
        model: With one adapter.
        generator: Draws A, Kaiming-uniform, as peft draws it.
    """
    drawn: set[int] = set()
    with torch.no_grad():
        for _, layer in layers(model):
            a, b = layer.lora_A["default"], layer.lora_B["default"]
            if id(a) not in drawn:
                fresh = torch.empty_like(a.weight, device="cpu")
                a.weight.copy_(nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator))
                for parameter in b.parameters():
                    parameter.zero_()
            drawn.add(id(a))
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                for copied, own in zip(
                    module.modules_to_save["default"].parameters(), module.original_module.parameters(), strict=True
                ):
                    copied.copy_(own)
            elif isinstance(module, TrainableTokensLayer) and module.tied_adapter is None:
                module.trainable_tokens_delta["default"].copy_(module.trainable_tokens_original["default"])


class OutputSizes:
    """Measures g = mean over tokens of |s B A x|^2 of every layer while it is entered, from what goes into the layers.

    Args:
        model: With one adapter, in eval mode.
    """

    def __init__(self, model: nn.Module):
        self._layers = dict(layers(model))
        self._sums: dict[str, Any] = dict.fromkeys(self._layers, 0.0)
        self._tokens = dict.fromkeys(self._layers, 0)

    def __enter__(self) -> OutputSizes:
        self._hooks = [layer.register_forward_pre_hook(self._seen(name)) for name, layer in self._layers.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def means(self) -> Mapping[str, float]:
        """Return name -> g; 0 where nothing went through a layer."""
        return {name: float(total) / max(self._tokens[name], 1) for name, total in self._sums.items()}

    def _seen(self, name: str) -> Any:
        layer = self._layers[name]

        def add(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            x = args[0].detach().to(a.dtype)
            x = x.reshape(-1, x.shape[-1])
            update = layer.scaling["default"] * nn.functional.linear(nn.functional.linear(x, a), b)
            self._sums[name] += update.square().sum()
            self._tokens[name] += len(x)

        return add
