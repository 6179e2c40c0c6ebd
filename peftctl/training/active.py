"""What makes the steps of a run fast and small, for the run to say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peftctl.methods.base import Method
from peftctl.models import short_attention
from peftctl.models.lean_blocks import lean_forwards
from peftctl.recipe.schema import CLASSIFICATION, Recipe
from peftctl.training.passes import pass_tokens
from peftctl.training.precision import autocast_type
from peftctl.tuners.lora_linear import LeanTraining


def active(recipe: Recipe, method: Method, model: Any, device: str) -> Iterator[str]:
    """Yield what is active in the steps of a run.

    Args:
        recipe: The run's.
        method: The recipe's.
        model: That trains.
        device: `cpu`, `cuda`, ...
    """
    if recipe.model.task not in CLASSIFICATION:
        yield "logits at supervised positions"
    yield "rows of similar length together"
    if tokens := pass_tokens(recipe, method, device):
        yield f"passes of {tokens:,} tokens"
    kernel = model.config.get_text_config()._attn_implementation
    autocast = autocast_type(recipe, method)
    computes = autocast or str(model.dtype).removeprefix("torch.")
    if device == "cpu" and kernel == "sdpa" and computes == "bfloat16":
        yield f"rows of up to {short_attention.LONGEST:,} tokens attend by matrix products"
    if device == "cpu" and (lean := lean_forwards(model)):
        yield f"{len(lean)} norms and gated parts keep less"
    fused = sum(isinstance(m, LeanTraining) and m.one_operation(model.dtype) for m in model.modules())
    if fused and not autocast:
        yield f"{fused} layers and their LoRA as one operation each"
    if recipe.train.optimizer == "adamw":
        yield "fused AdamW"
    if recipe.train.gradient_checkpointing:
        yield "gradient checkpointing"
