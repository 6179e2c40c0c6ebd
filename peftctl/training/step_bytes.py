"""What one training step allocates, found by running it on tensors without memory.

The model runs forward and backward as the trainer runs it, on the widest batch, but its tensors are PyTorch's fake
ones: they have shapes and types, autograd keeps them, no number is computed. A dispatch mode sees every storage come
and go. So the count holds for any architecture, attention kernel and method, without a formula for each.

Blocks of equal shape need equal bytes, so only three of a run of them are run, and the rest is added in proportion.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftctl.models.lean_blocks import lean_blocks, lean_forwards
from peftctl.models.short_attention import short_rows
from peftctl.models.supervised import supervised_forward
from peftctl.training.stand_ins import fake_tensors, fused_dropout, quantised_layers
from peftctl.training.waiting_head import head_can_wait

_START, _END = "start", "end"
_PARTS = ("activations", "logits", "gradients")
_KEPT_BLOCKS = 3


@dataclass(frozen=True)
class StepBytes:
    """Bytes that a step allocates and still holds at its peak, beside weights and optimizer state.

    Args:
        activations: Kept for the backward pass, and temporaries.
        logits: The head's output, its gradient and what the loss needs.
        gradients: Those of parameters that are complete at that moment.
        heap: Most of activations and logits that ever lay in allocations below `StepSettings.heap_limit`.
    """

    activations: int
    logits: int
    gradients: int
    heap: int

    @property
    def total(self) -> int:
        """Sum, without `heap`, which is no other memory."""
        return self.activations + self.logits + self.gradients


@dataclass(frozen=True)
class StepSettings:
    """How the trainer runs the step.

    Args:
        loss: `Method.loss`.
        autocast: Type of the forward pass over float32 weights; None without autocast.
        checkpointing: Blocks are recomputed in the backward pass.
        accumulates: Gradients of earlier micro-steps, or their shares, are there all the time: they are not counted.
        stored: Names of the linear layers whose weights are stored quantised -> bits.
        compute: Type that these are multiplied in.
        on_gpu: Count a GPU's kernels where they keep less.
        heap_limit: Bytes below which the allocator keeps a tensor in its heap.
        divided: The engine divides the weights.
    """

    loss: Callable[..., dict[str, torch.Tensor]]
    autocast: torch.dtype | None = None
    checkpointing: bool = False
    accumulates: bool = False
    stored: Mapping[str, int] = field(default_factory=dict)
    compute: torch.dtype = torch.bfloat16
    on_gpu: bool = False
    heap_limit: int = 0
    divided: bool = False


def step_bytes(model: nn.Module, batch: Mapping[str, torch.Tensor], settings: StepSettings) -> StepBytes:
    """Count the bytes of a step.

    Args:
        model: With the method applied, on the meta device; it comes back as it was.
        batch: What the collator makes of the rows.
        settings: How the step runs.

    Raises:
        Exception: Whatever the model's code raises where it needs numbers, not shapes.
    """
    runs = [run for stack in stacks(model) for run in _equal_runs(stack)]
    with (
        _shortened(runs),
        fake_tensors(model),
        quantised_layers(model, settings.stored, settings.compute),
        _checkpointed(model, settings),
    ):
        was_training = model.training
        model.train()
        try:
            ledger = _run(model, batch, settings)
        finally:
            model.train(was_training)
    for stack, first, length in runs:
        left_out = length - _KEPT_BLOCKS
        if left_out <= 0:
            continue
        # The first of a run may keep less: where nothing below it trains, its input needs no gradient.
        before, after = (ledger.entries[id(stack[first + i])] for i in (1, 2))
        for label in ("activations", "logits", "heap"):
            ledger.peaks[_START][label] += left_out * (after[label] - before[label])
        if not settings.accumulates:
            ledger.peaks[_END]["gradients"] += left_out * _gradient_bytes(stack[first])
    peak = max(ledger.peaks.values(), key=lambda count: sum(count[label] for label in _PARTS))
    # The heap does not shrink: what activations left in it is still there when gradients peak.
    heap = max(count["heap"] for count in ledger.peaks.values())
    return StepBytes(**{label: peak[label] for label in _PARTS}, heap=heap)


_Run = tuple[nn.ModuleList, int, int]
"""A list of blocks, the first of a run of equal ones, and how many they are."""


def stacks(model: nn.Module) -> list[nn.ModuleList]:
    """Return the outermost lists of two modules or more: the blocks of a decoder, of an encoder."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
    return [m for name, m in lists.items() if not any(name.startswith(other + ".") for other in lists)]


def _equal_runs(stack: nn.ModuleList) -> list[_Run]:
    runs: list[_Run] = []
    previous = None
    for i, block in enumerate(stack):
        shape = tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in block.named_parameters())
        kinds = tuple(type(m) for m in block.modules())
        if runs and (shape, kinds) == previous:
            runs[-1] = (stack, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((stack, i, 1))
        previous = (shape, kinds)
    return runs


def _gradient_bytes(block: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in block.parameters() if p.requires_grad)


def _run(model: nn.Module, batch: Mapping[str, torch.Tensor], settings: StepSettings) -> _Ledger:
    autocast = torch.autocast("cpu", settings.autocast or torch.bfloat16, enabled=settings.autocast is not None)
    with autocast:
        lean = not settings.divided and head_can_wait(model, batch)
    ledger = _Ledger(settings)
    ledger.ignore(*model.parameters(), *model.buffers(), *batch.values())
    with ExitStack() as stack:
        for handle in _labels(model, ledger):
            stack.callback(handle.remove)
        if settings.on_gpu:
            stack.enter_context(fused_dropout())
        else:
            stack.enter_context(short_rows())
            stack.enter_context(lean_blocks(lean_forwards(model)))
        stack.enter_context(ledger)
        with autocast:
            parts = settings.loss(model, batch, lambda rows: supervised_forward(model, rows, lean=lean))
            loss = torch.stack(list(parts.values())).sum()
        del parts
        ledger.watch_last_block()
        loss.backward()
    return ledger


class _Ledger(TorchDispatchMode):
    """Knows every storage that is alive, and how much was alive at the worst moment.

    Two windows have a peak each: until the last block's backward pass is over, when all activations are there, and
    after it, when gradients pile up. Either grows in proportion to the number of blocks; the larger of both need not.
    """

    def __init__(self, settings: StepSettings):
        super().__init__()
        self.settings = settings
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {_START: Counter(), _END: Counter()}
        self.highest = {_START: 0, _END: 0}
        self.window = _START
        self.label = "activations"
        self.held: dict[int, tuple[str, Any]] = {}
        self.entries: dict[int, Counter[str]] = {}
        self.last_input: torch.Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # two thirds of all calls, and slow to ask the fake tensors' mode
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._enter(tensor)
        return result

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Do not count what is there before the step."""
        for tensor in tensors:
            self.held[tensor.untyped_storage()._cdata] = ("", None)

    def gradient(self, parameter: torch.Tensor) -> None:
        """A parameter's gradient is complete."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        label, reference = self.held.get(storage._cdata, ("", None))
        if reference is None:
            return
        size = storage.nbytes()
        self._count(label, -size)
        self.held[storage._cdata] = ("gradients", reference)
        self._count("gradients", size)

    def block(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a block's first forward pass: remember what is alive, and what comes in."""
        if id(module) in self.entries:  # recomputed in the backward pass
            return
        self.entries[id(module)] = Counter(self.live)
        states = next((t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.requires_grad), None)
        self.last_input = states if states is not None else self.last_input

    def watch_last_block(self) -> None:
        """Let the second window begin when the backward pass leaves the last block."""
        if self.last_input is not None:
            self.last_input.register_hook(lambda _: setattr(self, "window", _END))
            self.last_input = None

    def head(self, module: nn.Module, args: Any) -> None:
        """Before the head's forward pass: from here on logits are made, until their gradient has left the head."""
        self.label = "logits"
        if args and isinstance(args[0], torch.Tensor) and args[0].requires_grad:
            args[0].register_hook(lambda _: setattr(self, "label", "activations"))

    def _enter(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.held:
            return
        size = storage.nbytes()
        self.held[key] = (self.label, weakref.ref(storage, lambda _: self._leave(key, size)))
        self._count(self.label, size)
        total = self.live["activations"] + self.live["logits"]
        total += 0 if self.settings.accumulates else self.live["gradients"]
        if total > self.highest[self.window]:
            self.highest[self.window] = total
            self.peaks[self.window] = Counter(self.live)
            if self.settings.accumulates:
                self.peaks[self.window]["gradients"] = 0

    def _leave(self, key: int, size: int) -> None:
        label, _ = self.held.pop(key)
        self._count(label, -size)

    def _count(self, label: str, size: int) -> None:
        self.live[label] += size
        if label != "gradients" and abs(size) < self.settings.heap_limit:
            self.live["heap"] += size


def _labels(model: Any, ledger: _Ledger) -> Iterator[Any]:
    """Tell the ledger where blocks, the head and gradients are."""
    for stack in stacks(model):
        for block in stack:
            yield block.register_forward_pre_hook(ledger.block, with_kwargs=True)
    head = model.get_output_embeddings()
    if head is not None:
        yield head.register_forward_pre_hook(ledger.head)
    for parameter in model.parameters():
        if parameter.requires_grad:
            yield parameter.register_post_accumulate_grad_hook(ledger.gradient)


@contextmanager
def _shortened(runs: list[_Run]) -> Iterator[None]:
    """Leave no more than `_KEPT_BLOCKS` blocks of each run in its list."""
    whole = {id(stack): (stack, stack._modules) for stack, _, _ in runs}
    try:
        for stack, modules in whole.values():
            blocks = list(modules.values())
            spans = [(first, first + min(length, _KEPT_BLOCKS)) for owner, first, length in runs if owner is stack]
            kept = [block for first, end in spans for block in blocks[first:end]]
            stack._modules = {str(i): block for i, block in enumerate(kept)}
        yield
    finally:
        for stack, modules in whole.values():
            stack._modules = modules


@contextmanager
def _checkpointed(model: Any, settings: StepSettings) -> Iterator[None]:
    if not settings.checkpointing:
        yield
        return
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.activation_checkpointing_disable()
        model.disable_input_require_grads()  # which enabling has let the embeddings' output require
