"""What several processes share: nothing in plain data parallel; ZeRO's stages by a DeepSpeed configuration.

ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) over N processes: stage 1 shares the optimizer's state, stage 2 the
gradients too, stage 3 and FSDP the weights too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peftctl.errors import UsageError
from peftctl.recipe.schema import Recipe

_BUCKET = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`, elements."""
_REUSE = 1_000_000_000
"""DeepSpeed's default `stage3_max_reuse_distance`, elements: weights that are used again within it stay gathered."""
_HALF, _FULL = 2, 4
_OURS = ("optimizer", "scheduler")
_HALF_TYPES = ("bf16.enabled", "fp16.enabled")


@dataclass(frozen=True)
class State:
    """Bytes that stay from step to step in one process; `host` is main memory where the device has its own."""

    weights: int
    quantised: int
    gradients: int
    optimizer: int
    buffers: int
    host: int


@dataclass(frozen=True)
class Sharing:
    """How tensors are spread over processes.

    Args:
        processes: N.
        stage: Of ZeRO, 3 for FSDP; None where every process holds everything.
        engine: A name of the matrix: single, ddp, zero1, zero2, zero3 or fsdp.
        half: Weights and gradients in 16 bits, beside float32 copies of the weights that train.
        offload_optimizer: The optimizer's state lives in main memory.
        offload_weights: So do the weights' shares.
        settings: Section `zero_optimization` of the configuration.
    """

    processes: int = 1
    stage: int | None = None
    engine: str = "single"
    half: bool = False
    offload_optimizer: bool = False
    offload_weights: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients, or a copy of them, stay while activations are there."""
        return self.stage is not None

    def state(
        self, parameters: Iterable[torch.Tensor], optimizer: int, hidden: int, quantised: int = 0, gathered: int = 0
    ) -> State:
        """Return the bytes of one process.

        Args:
            parameters: All that are not quantised.
            optimizer: Bytes of the optimizer's state without sharing.
            hidden: Width of the model, which `auto` sizes follow.
            quantised: Bytes of the quantised weights, whose scales nothing shares.
            gathered: Bytes of weights that FSDP has whole at a time.
        """
        everything = list(parameters)
        trained = [p for p in everything if p.requires_grad]
        count = sum(p.numel() for p in trained)
        if self.stage is None:
            gradients = sum(p.numel() * p.element_size() for p in trained)
            copies = gradients if self.processes > 1 else 0  # the buckets that are sent
            weights = sum(p.numel() * p.element_size() for p in everything)
            return State(weights, quantised, gradients, optimizer, copies, 0)
        width = _HALF if self.half else _FULL
        weights = sum(p.numel() * min(p.element_size(), width) for p in everything)
        gradients = count * width
        optimizer += _FULL * count if self.half else 0
        buffers = gathered if self.engine == "fsdp" else self._buckets(count, hidden) * width
        host = 0
        optimizer = self._share(optimizer, 1)
        gradients = self._share(gradients, 2)
        if self.offload_optimizer:  # with float32 gradients for it; what is sent there needs no place on the device
            host += optimizer + self._share(_FULL * count, 1)
            optimizer = 0
            gradients = 0 if self.stage >= 2 else gradients
        if self.stage == 3:
            buffers += 0 if gathered else self._whole(everything) * width + min(quantised, self._kept)
            weights, quantised = self._share(weights, 3), self._share(quantised, 3)
            if self.offload_weights:
                host, weights, quantised = host + weights + quantised, 0, 0
        return State(weights, quantised, gradients, optimizer, buffers, host)

    def _share(self, size: int, from_stage: int) -> int:
        return -(-size // self.processes) if (self.stage or 0) >= from_stage else size

    def _buckets(self, count: int, hidden: int) -> int:
        """Return elements of the buckets in which gradients are summed; two where sending overlaps with computing."""
        bucket = self.settings.get("reduce_bucket_size", _BUCKET)
        bucket = hidden * hidden if bucket == "auto" else int(bucket)
        overlapped = self.settings.get("overlap_comm", self.stage == 3)
        return min(bucket, count) * (2 if overlapped else 1)

    def _whole(self, parameters: Iterable[torch.Tensor]) -> int:
        """Return elements of gathered weights: those that are used again soon, and the two largest at a time."""
        sizes = [p.numel() for p in parameters]
        return min(sum(sizes), max(self._kept, 2 * max(sizes, default=0)))

    @property
    def _kept(self) -> int:
        return int(self.settings.get("stage3_max_reuse_distance", _REUSE))


def read_sharing(recipe: Recipe, processes: int, *, offloads: bool, autocast: str | None) -> Sharing:
    """Return how a recipe's run spreads its tensors.

    Args:
        recipe: With `backend:` and a concrete dtype.
        processes: How many train together.
        offloads: The device has a memory of its own; else offloading moves nothing.
        autocast: See `autocast_type`.

    Raises:
        UsageError: The DeepSpeed configuration is missing, no JSON, names no stage from 1 to 3, or contradicts the
            recipe.
    """
    if recipe.backend.name == "single" or (recipe.backend.name == "fsdp" and processes == 1):
        return Sharing(processes, engine="single" if processes == 1 else "ddp")
    if recipe.backend.name == "fsdp":
        return Sharing(processes, 3, "fsdp")
    if recipe.backend.config is None:
        raise UsageError("backend.config: deepspeed needs a configuration, e.g. configs/deepspeed/zero2.json")
    where = f"backend.config: {recipe.backend.config}"
    ours = _recipe_settings(recipe, processes, autocast)
    try:
        content = json.loads(Path(recipe.backend.config).read_text(encoding="utf-8"))
        zero = dict(content.get("zero_optimization", {}))
        stage = zero.get("stage", 0)
        theirs = {key: _at(content, key) for key in ours}
        places = {
            kind: dict(zero.get(f"offload_{kind}") or {}).get("device", "none") for kind in ("optimizer", "param")
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{where}: can't be read as a DeepSpeed configuration: {error}") from error
    if stage not in (1, 2, 3):
        raise UsageError(f"{where}: zero_optimization.stage: expected 1, 2 or 3, got {stage!r}")
    if decided := [key for key in _OURS if key in content]:
        raise UsageError(f"{where}: {decided[0]}: the recipe's `train:` section decides about it; remove it there")
    for key, value in theirs.items():
        if value not in (None, "auto", ours[key]):
            raise UsageError(f'{where}: {key}: got {value!r}, but the recipe comes to {ours[key]!r}; set it to "auto"')
    return Sharing(
        processes,
        stage,
        f"zero{stage}",
        half=any(ours[key] and theirs[key] for key in _HALF_TYPES),
        offload_optimizer=offloads and places["optimizer"] != "none",
        offload_weights=offloads and stage == 3 and places["param"] != "none",
        settings=zero,
    )


def _recipe_settings(recipe: Recipe, processes: int, autocast: str | None) -> dict[str, Any]:
    """Return what the library puts in the place of `auto`, by the configuration's keys."""
    train = recipe.train
    return {
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "train_batch_size": train.batch_size * train.gradient_accumulation * processes,
        "gradient_clipping": train.max_grad_norm,
        "bf16.enabled": autocast == "bfloat16",
        "fp16.enabled": autocast == "float16",
    }


def _at(content: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key; None where there is none."""
    section, _, name = key.rpartition(".")
    return (content.get(section, {}) if section else content).get(name)
