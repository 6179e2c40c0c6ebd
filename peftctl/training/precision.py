"""The type that a forward pass computes in where it is not that of the weights."""

from __future__ import annotations

from typing import Literal

from peftctl.methods.base import Method
from peftctl.recipe.schema import Recipe


def autocast_type(recipe: Recipe, method: Method) -> Literal["bfloat16", "float16"] | None:
    """Return what training runs under autocast in; None where it computes in the type of the weights.

    float16 always does: only so does the library scale the loss, without which small gradients vanish.
    """
    if recipe.model.dtype == "float16":
        return "float16"
    return "bfloat16" if recipe.model.dtype == "bfloat16" and method.autocast else None
