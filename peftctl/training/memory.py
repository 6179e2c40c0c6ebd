"""What a run will need, in bytes of one process at the peak of a step, from the model's shapes. Nothing is loaded.

Weights, gradients, optimizer state and quantised weights follow from the parameters; what a step allocates beside them
is counted by running it on tensors without memory (`step_bytes`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftctl.backends.device import dtype_of
from peftctl.backends.heap import heap_limit
from peftctl.data.encode import EncodedRow
from peftctl.errors import UsageError
from peftctl.methods.base import Method
from peftctl.recipe.schema import QuantizationSection, Recipe
from peftctl.training.passes import pass_tokens
from peftctl.training.precision import autocast_type
from peftctl.training.sharing import Sharing, read_sharing
from peftctl.training.step_bytes import StepBytes, StepSettings, stacks, step_bytes
from peftctl.training.widths import step_bytes_by_widths, widest_rows

CUDA_CONTEXT = 512 * 2**20
"""What the driver, kernels and libraries take on a GPU beside PyTorch's own count: a usual figure."""
HEAP_HOLES = 0.5
"""Bytes of holes in glibc's heap per byte of activations in it: 0.22 to 0.66 in eleven runs, see `backends/heap.py`."""
_MIN_8BIT_SIZE = 4096
"""Tensors below this size keep 32-bit states in 8-bit optimizers."""
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Machine:
    """Where the run is to happen.

    Args:
        kind: `cpu`, `cuda` or `mps`.
        processes: How many train together.
        process_bytes: Main memory in use before the model is there.
    """

    kind: str
    processes: int = 1
    process_bytes: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process at the peak of a training step.

    Args:
        device: Kind of the device, see `Machine`.
        weights: Of all parameters that are not quantised.
        quantised: Quantised weights with their scales.
        gradients: Of trainable parameters, where they add to the peak.
        optimizer: Its state, and the float32 copies that DeepSpeed keeps of 16-bit weights.
        activations: What the backward pass needs, and temporaries.
        logits: The head's output at supervised positions, its gradient, and what the loss needs.
        sharing: Buffers for gradients and weights on their way between processes.
        allocator: Holes in the heap that no later tensor fits.
        process: The interpreter and its libraries on a CPU, the driver's context on a GPU.
        host: Main memory beside the device's: offloaded and paged optimizer state and weights.
        traced: Whether the step was run on tensors without memory; else it is estimated from the model's widths.
    """

    device: str
    weights: int
    quantised: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    sharing: int
    allocator: int
    process: int
    host: int
    traced: bool

    @property
    def parts(self) -> dict[str, int]:
        """What adds up to the total."""
        return {name: value for name, value in vars(self).items() if name not in ("device", "host", "traced")}

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.parts.values())

    @property
    def measurable(self) -> int:
        """Bytes that `peak_memory_bytes` of a run sees: on a GPU it counts PyTorch's tensors alone."""
        return self.total if self.device == "cpu" else self.total - self.process


def plan_memory(
    recipe: Recipe, method: Method, model: Any, rows: Sequence[EncodedRow], collate: Any, machine: Machine
) -> MemoryPlan:
    """Plan the peak of a run.

    Args:
        recipe: The run's recipe, with a concrete dtype.
        method: The recipe's.
        model: With the method applied, on the meta device, in the types that training has; it is not changed.
        rows: The training rows.
        collate: Makes a batch of rows.
        machine: Where it is to run.

    Raises:
        UsageError: The DeepSpeed configuration can't be read, or the model's widths can't.
    """
    stored = quantised_layers(model, recipe.quantization)
    quantised = {id(m.weight) for m in stored.values()}
    plain = [p for p in model.parameters() if id(p) not in quantised]
    share = read_sharing(
        recipe, machine.processes, offloads=machine.kind != "cpu", autocast=autocast_type(recipe, method)
    )
    packed, scales = quantised_bytes(model, recipe.quantization)
    hidden = model.get_input_embeddings().weight.shape[-1]
    gathered = _gathered(model) if share.engine == "fsdp" else 0
    state = share.state(plain, optimizer_bytes(recipe, plain), hidden, packed, gathered)
    tokens = pass_tokens(recipe, method, machine.kind)
    widest, several = widest_rows(rows, recipe, model, machine.processes, tokens) if rows else ([], False)
    settings = _settings(recipe, method, stored, share, machine, several=several)
    step, traced = _step(model, widest, collate, settings)
    optimizer, host = state.optimizer, state.host
    if machine.kind == "cuda" and recipe.train.optimizer.startswith("paged"):  # moves out when the device is full
        optimizer, host = 0, host + optimizer
    return MemoryPlan(
        device=machine.kind,
        weights=state.weights,
        quantised=state.quantised + scales,
        gradients=state.gradients if settings.accumulates else step.gradients,
        optimizer=optimizer,
        activations=step.activations,
        logits=step.logits,
        sharing=state.buffers,
        allocator=round(HEAP_HOLES * step.heap),
        process={"cpu": machine.process_bytes, "cuda": CUDA_CONTEXT}.get(machine.kind, 0),
        host=host,
        traced=traced,
    )


def _gathered(model: Any) -> int:
    """Return the bytes of weights that FSDP has whole: two blocks at a time, and always what is in none."""
    blocks = [{id(p): p.nbytes for p in block.parameters()} for stack in stacks(model) for block in stack]
    inside = {key for block in blocks for key in block}
    largest = max((sum(block.values()) for block in blocks), default=0)
    return 2 * largest + sum(p.nbytes for p in model.parameters() if id(p) not in inside)


def quantised_layers(model: Any, quantization: QuantizationSection) -> dict[str, Any]:
    """Return the linear layers whose weights are stored quantised, by name: all frozen ones but the output head.

    Args:
        model: A base model, or one with a method applied.
        quantization: None of them where it has no `bits`.
    """
    if quantization.bits is None:
        return {}
    head = model.get_output_embeddings()
    bare = all(p.requires_grad for p in model.parameters())  # nothing is frozen in a base model before the method
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and (bare or not module.weight.requires_grad)
    }


def quantised_bytes(model: Any, quantization: QuantizationSection) -> tuple[int, int]:
    """Return the bytes of the quantised weights, and those of their scales, as bitsandbytes stores them.

    4 bits and a float32 scale a block of 64 weights, 4.5 bits; with double quantisation the scales take 8 bits and one
    float32 a block of 256 of them, 4.127 bits (Dettmers et al. 2023). 8 bits and a float32 scale a row of int8.
    """
    weights = scales = 0
    for layer in quantised_layers(model, quantization).values():
        size = layer.weight.numel()
        blocks = math.ceil(size / 64)
        if quantization.bits == 8:
            weights += size
            scales += 4 * layer.weight.shape[1 if isinstance(layer, Conv1D) else 0]
            continue
        weights += math.ceil(size / 2)
        if quantization.double_quant is False:
            scales += 4 * blocks + _TABLE
        else:
            scales += blocks + 4 * math.ceil(blocks / 256) + 4 + _TABLE + _NESTED_TABLE
    return weights, scales


_TABLE, _NESTED_TABLE = 16 * 4, 256 * 4
"""Bytes of the tables of values that every layer has of its own."""


def optimizer_bytes(recipe: Recipe, parameters: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the optimizer's state: two float32 or 8-bit moments, factored second moments, or nothing."""
    name = recipe.train.optimizer
    trainable = [p for p in parameters if p.requires_grad]
    if name == "sgd":
        return 0
    if name == "adafactor":
        return sum(4 * (sum(p.shape[-2:]) * math.prod(p.shape[:-2]) if p.ndim > 1 else p.numel()) for p in trainable)
    if name.endswith("8bit"):  # with a float32 scale a block of 256, twice
        return sum(p.numel() * 2 + p.numel() // 32 if p.numel() >= _MIN_8BIT_SIZE else 8 * p.numel() for p in trainable)
    return sum(8 * p.numel() for p in trainable)


def _settings(
    recipe: Recipe, method: Method, stored: Mapping[str, Any], share: Sharing, machine: Machine, *, several: bool
) -> StepSettings:
    dtype = dtype_of(recipe.model.dtype)
    autocast = autocast_type(recipe, method)
    compute = recipe.quantization.compute_dtype
    checkpointing = recipe.train.gradient_checkpointing
    return StepSettings(
        loss=method.loss,
        autocast=dtype_of(autocast) if autocast else None,
        checkpointing=checkpointing,
        accumulates=several or recipe.train.gradient_accumulation > 1 or share.keeps_gradients,
        stored=dict.fromkeys(stored, recipe.quantization.bits or 0),
        compute=dtype_of(compute) if compute else dtype,
        on_gpu=machine.kind == "cuda",
        heap_limit=heap_limit(spared=spares_memory(recipe, machine.processes)) if machine.kind == "cpu" else 0,
        divided=share.stage == 3,
    )


def _step(model: Any, rows: Sequence[EncodedRow], collate: Any, settings: StepSettings) -> tuple[StepBytes, bool]:
    """Return the bytes of a pass of these rows, and whether they were counted rather than estimated."""
    if not rows or not any(p.requires_grad for p in model.parameters()):
        return StepBytes(0, 0, 0, 0), True
    batch = collate(rows)
    try:
        return step_bytes(model, batch, settings), True
    except Exception:  # shapes without a forward pass, or code of the model's own that looks at numbers
        return step_bytes_by_widths(model, batch, settings), False


def spares_memory(recipe: Recipe, processes: int) -> bool:
    """Tell whether a run on a CPU keeps tensors out of the heap, see `backends/heap.py`.

    Args:
        recipe: The run's.
        processes: How many train together.
    """
    return recipe.train.gradient_checkpointing or processes > 1


def parse_bytes(text: str) -> int:
    """Return the bytes of `24GB`, `16 GiB` or a bare number.

    Raises:
        UsageError: It is none of these.
    """
    number = text.strip().upper().replace(" ", "")
    for unit, factor in sorted(_UNITS.items(), key=lambda item: -len(item[0])):
        if number.endswith(unit):
            number, scale = number[: -len(unit)], factor
            break
    else:
        scale = 1
    try:
        return int(float(number) * scale)
    except ValueError:
        raise UsageError(f"--memory: expected a size such as 24GB, got '{text}'") from None
