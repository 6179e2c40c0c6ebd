"""A micro-batch in several passes: fewer activations at a time, and the gradient of one.

The loss is a sum over the supervised tokens of the optimizer step, so it does not matter how many rows go through the
model together. What they need of memory does: in a step of LoRA activations are most of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftctl.methods.base import Method
from peftctl.recipe.schema import Recipe

CPU_TOKENS = 1024
"""Tokens of a pass on CPUs where the recipe is silent: more are not faster, see scripts/bench/README.md."""


def pass_tokens(recipe: Recipe, method: Method, device: str) -> int | None:
    """Return how many tokens, padding included, go through the model at once; None where a micro-batch goes whole.

    Args:
        recipe: The run's.
        method: The recipe's.
        device: `cpu`, `cuda`, ...
    """
    if not may_cut(recipe, method):
        return None
    return recipe.train.tokens_per_pass or (CPU_TOKENS if device == "cpu" else None)


def may_cut(recipe: Recipe, method: Method) -> bool:
    """Tell whether a micro-batch may take several passes: not where an engine counts backward passes."""
    return recipe.backend.name == "single" and not method.whole_batches


def cut(lengths: Sequence[int], tokens: int | None) -> list[slice]:
    """Cut rows into consecutive parts of at most so many tokens, padding included, but of a row at least.

    Args:
        lengths: Tokens of the rows of a micro-batch, which come sorted by them; without rows there is one empty part.
        tokens: None leaves them together.
    """
    parts: list[slice] = []
    first = widest = 0
    for i, length in enumerate(lengths):
        widest = max(widest, length)
        if tokens and i > first and (i + 1 - first) * widest > tokens:
            parts.append(slice(first, i))
            first, widest = i, length
    return [*parts, slice(first, len(lengths))]
