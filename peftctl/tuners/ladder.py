"""Ladder side-tuning as a tuner of peft: a side network in the place of a decoder's final norm.

    y = norm(h_L) + Up(s)     with `merge_last`; Up starts at 0, so that this is the base
    y = Up(s)                 without

goes to the frozen head. Hooks on the base's blocks hand their calls over, with the stream cut off from the graph: no
gradient enters the base, also where gradient checkpointing lets embeddings require one.

In generation the side's keys and values lie in the base's own cache, in layers behind the base's: what reorders,
repeats or crops the cache then does so with both.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from peftctl.errors import RunError
from peftctl.tuners._layer_tuner import LayerTuner
from peftctl.tuners.ladder_side import Call, Side
from peftctl.tuners.ladder_stack import Stack, find_stack, narrow_stack, unsupported

TYPE = "PEFTCTL_LADDER"
"""What adapter_config.json calls this tuner."""


@dataclass
class LadderConfig(PeftConfig):
    """Settings that are saved with the adapter.

    Args:
        reduction: r: the side is d / r wide.
        layers: Blocks of the base that have a rung, ascending.
        temperature: T of the gates.
        merge_last: Add the side's output to the base's last state; else it takes its place.
        target_modules: The final norm.
        exclude_modules: Exceptions from it.
        modules_to_save: Modules that train whole beside the side.
    """

    reduction: int = 8
    layers: list[int] = field(default_factory=list)
    temperature: float = 0.1
    merge_last: bool = True
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TYPE


class LadderEnd(nn.Module, BaseTunerLayer):
    """The final norm with side networks, one of them active.

    Args:
        base_layer: The norm.
        stack: Where it is.
        blocks: Those of the base, which stay where they are.
    """

    adapter_layer_names = ("ladder_side",)

    def __init__(self, base_layer: nn.Module, stack: Stack, blocks: nn.ModuleList):
        super().__init__()
        self.base_layer = base_layer
        self.stack, self.depth = stack, len(blocks)
        self.ladder_side = nn.ModuleDict()
        self.merges: dict[str, bool] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.entry: Call | None = None
        self.calls: dict[int, Call] = {}
        self.hooks: list[Any] = [blocks[0].register_forward_pre_hook(self.enter, with_kwargs=True)]
        for i, block in enumerate(blocks):
            self.hooks.append(block.register_forward_hook(partial(self.leave, i), with_kwargs=True))

    def update_layer(self, adapter_name: str, side: Side, config: LadderConfig) -> None:
        """Add a side network."""
        self.ladder_side[adapter_name] = side
        self.merges[adapter_name] = config.merge_last
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def active_side(self) -> Side | None:
        """The side network that runs, if any."""
        found = [name for name in self.active_adapters if name in self.ladder_side]
        return None if self.disable_adapters or not found else self.ladder_side[found[0]]  # type: ignore[return-value]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the side network that runs.

        Raises:
            ValueError: There is more than one.
        """
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError("side networks take each other's place: only one can be active")
        super().set_adapter(adapter_names, inference_mode)

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the first block: cut the stream off from the graph, and make room in the cache."""
        side = self.active_side
        if side is None:
            return None
        h, args, kwargs = _apart(args, kwargs)
        self.entry, self.calls = Call(h.detach(), args, kwargs), {}
        if cache := _cache_of(self.entry):
            _make_room(cache, self.depth, side.layers)
        return (self.entry.h, *args), kwargs

    def leave(self, i: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Behind block i: keep its call, where a rung reads it."""
        side = self.active_side
        if side is not None and i in side.layers:
            _, args, kwargs = _apart(args, kwargs)
            h = output[0] if isinstance(output, tuple) else output
            self.calls[i] = Call(h.detach(), args, kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the head reads for h_L of shape (batch, seq, d)."""
        side = self.active_side
        if side is None:
            return self.base_layer(x)
        entry, calls = self.entry, self.calls
        self.entry, self.calls = None, {}
        assert entry is not None
        out = side(entry, calls)
        return self.base_layer(x) + out if self.merges[self.active_adapters[0]] else out

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: there is no weight that computes the same.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("a side network is a network of its own: no weight of the base can take it up")

    def __repr__(self) -> str:
        return "ladder." + super().__repr__()


class LadderModel(LayerTuner):
    """Puts a `LadderEnd` around the final norm."""

    prefix = "ladder_"
    tuner_layer_cls = LadderEnd

    def around(self, target: nn.Module, config: Any, key: str) -> LadderEnd:
        """Return the layer around the norm, which hears the blocks."""
        stack = find_stack(self.model)
        holder = stack.within(self.model)
        # Narrow blocks are of the base's class, and the library records the states of all modules of that class. It
        # looks for them only once: now, while there is no side.
        if isinstance(holder, PreTrainedModel) and holder._can_record_outputs:
            maybe_install_capturing_hooks(holder)
        return LadderEnd(target, stack, stack.block_list(self.model))

    def settings(self, config: Any, key: str) -> tuple[Side, LadderConfig]:
        """Return a new side network."""
        there = self.model.get_submodule(key)
        stack = there.stack if isinstance(there, LadderEnd) else find_stack(self.model)
        return make_side(self.model, stack, config), config

    def unload(self) -> nn.Module:
        """Return the base, without hooks."""
        ends = [module for module in self.model.modules() if isinstance(module, LadderEnd)]
        model = super().unload()
        for end in ends:
            for hook in end.hooks:
                hook.remove()
        return model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Return a key as it is saved: an adapter is a module, so its name stands in the middle."""
        key = key.replace(f".ladder_side.{adapter_name}.", ".ladder_side.")
        return super()._remove_adapter_name_from_key(key, adapter_name)  # type: ignore[no-any-return]


def make_side(model: Any, stack: Stack, config: LadderConfig) -> Side:
    """Return a new side network for a base, which may have others already."""
    blocks, norm = narrow_stack(model, stack, config.reduction)
    depth = len(blocks)
    width = model.config.get_text_config().hidden_size
    chosen = [blocks[i] for i in config.layers]
    for place, block in enumerate(chosen):
        for module in block.modules():
            if "layer_idx" in vars(module):
                vars(module)["layer_idx"] = depth + place  # where its keys and values lie in the cache
    return Side(
        width, width // config.reduction, chosen, norm, config.layers, config.temperature, zero_up=config.merge_last
    )


def refuse_what_fails(model: Any) -> None:
    """Run three tokens, the last one from the cache: that narrow blocks take a base's arguments shows only then.

    Args:
        model: A PeftModel with a new side network, in any mode, which it keeps.

    Raises:
        UsageError: They don't.
    """
    training = model.training
    ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    model.eval()
    try:
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).past_key_values
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise unsupported(model.config, "its blocks don't run at that width") from error
    finally:
        model.train(training)


def _apart(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """Return the stream that a block is called with, and the other arguments."""
    if args:
        return args[0], args[1:], dict(kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def _cache_of(call: Call) -> Cache | None:
    return next((value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Cache)), None)


def _make_room(cache: Cache, depth: int, layers: Sequence[int]) -> None:
    """Append to a new cache of a base of some depth a layer for each rung, of the kind that its block of the base has.

    Raises:
        RunError: The cache was filled without the side network.
    """
    if len(cache.layers) > depth:
        return
    if cache.get_seq_length():
        raise RunError("ladder_side_tuning: the cache was filled without the side network; begin with a new one")
    while cache.layer_class_to_replicate is not None and len(cache.layers) < depth:
        cache.layers.append(cache.layer_class_to_replicate())
    cache.layers += [copy.deepcopy(cache.layers[i]) for i in layers]
