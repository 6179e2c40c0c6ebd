"""A micro-batch in several passes: fewer activations at a time, and the gradient of one.

The loss is a sum over the supervised tokens of the optimizer step, so it does not matter how many rows go through the
model together. What they need of memory does: in a step of LoRA activations are most of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftctl.data.encode import EncodedRow
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


def cut(rows: Sequence[EncodedRow], tokens: int | None) -> list[Sequence[EncodedRow]]:
    """Cut rows into consecutive parts of at most so many tokens, padding included, but of a row at least.

    Args:
        rows: Of a micro-batch, which come sorted by length; without rows there is one part without any.
        tokens: None leaves them together.
    """
    parts: list[list[EncodedRow]] = [[]]
    widest = 0
    for row in rows:
        widest = max(widest, row.tokens)
        if tokens and parts[-1] and (len(parts[-1]) + 1) * widest > tokens:
            parts.append([])
            widest = row.tokens
        parts[-1].append(row)
    return list(parts)
