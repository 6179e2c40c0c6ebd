"""Finds methods by walking this folder: the file's name is the method's name, and nothing lists them twice."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from peftctl import methods
from peftctl.errors import UsageError, did_you_mean
from peftctl.methods.base import Method
from peftctl.recipe.loader import MethodSchema

_NOT_METHODS = {"base", "registry"}


@cache
def names() -> tuple[str, ...]:
    """Return the names of all methods, sorted."""
    found = (module.name for module in pkgutil.iter_modules(methods.__path__))
    return tuple(sorted(name for name in found if name not in _NOT_METHODS and not name.startswith("_")))


def get(name: str) -> type[Method]:
    """Return the class of a method.

    Raises:
        UsageError: There is no such method; the message suggests the nearest.
    """
    if name not in names():
        raise UsageError(f"unknown method '{name}'; {did_you_mean(name, names())}")
    return importlib.import_module(f"{methods.__name__}.{name}").Method


def schemas() -> dict[str, MethodSchema]:
    """Return what the recipe loader needs of every method."""
    return {name: _schema(get(name)) for name in names()}


def _schema(method: type[Method]) -> MethodSchema:
    return MethodSchema(config=method.Config, defaults=method.defaults, unread=method.unread)
