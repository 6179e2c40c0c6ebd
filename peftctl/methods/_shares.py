"""Shares of a run and of a number of things, for methods whose first stage finds out what the main one trains."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated

from pydantic import Field

from peftctl.errors import UsageError
from peftctl.methods.base import Stage
from peftctl.recipe.schema import Recipe

RunShare = Annotated[float, Field(gt=0, lt=1)]
"""Of a run's optimizer steps, for a stage before the main one."""


def exact(share: float) -> Fraction:
    """Return a share as it was written: 0.07 * 100 is 7 then, and not a little more, which would round up to 8."""
    return Fraction(repr(share))


def spread(k: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Share k out in proportion to sizes, so that the parts add up to k."""
    total, before, parts = sum(sizes.values()), 0, {}
    for name, size in sizes.items():
        parts[name] = k * (before + size) // total - k * before // total
        before += size
    return parts


def two_stages(recipe: Recipe, name: str, share: float, key: str) -> tuple[Stage, Stage]:
    """Divide a run, `max_steps` or `epochs`, into a first stage and the main one.

    Args:
        recipe: Says how long the run is.
        name: Of the first stage.
        share: Of the run that it gets, one step at least.
        key: Of the recipe, which holds the share.

    Raises:
        UsageError: `max_steps` has no step for the main stage.
    """
    whole = recipe.train.max_steps
    if whole is None:
        return Stage(name, share), Stage(steps=float(1 - exact(share)))
    first = max(1, round(exact(share) * whole))
    if first >= whole:
        raise UsageError(
            f"method.{key}: {first} steps leave none of train.max_steps, {whole}, for the main stage; lower it, or "
            "raise train.max_steps"
        )
    return Stage(name, first), Stage(steps=whole - first)
