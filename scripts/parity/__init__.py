"""Layer outputs and gradients against an independent float64 computation of the papers' equations."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from scripts.parity._core import Difference, compare


def names() -> list[str]:
    """Return the methods that have a fixture: the files of this folder."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def load(name: str) -> ModuleType:
    """Return a method's module: FIXTURE, given, naive, ours."""
    return importlib.import_module(f"{__name__}.{name}")


def compared(name: str) -> Difference:
    """Compute both sides of a method from the same numbers, and compare."""
    module = load(name)
    given = module.given()
    return compare(module.FIXTURE, module.ours(given), module.naive(given))
