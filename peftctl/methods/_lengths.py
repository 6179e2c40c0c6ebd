"""Lengths of schedules inside `method:`: optimizer steps, or a fraction of the stage, so that any run length fits."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Length = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0.0, lt=1.0)]


def in_steps(length: int | float, total: int) -> int:
    """Return a length in optimizer steps, rounded.

    Args:
        length: Steps, or a fraction of `total`.
        total: Optimizer steps of the stage.
    """
    return length if isinstance(length, int) else round(length * total)
