"""Collects what is wrong with a data set, so that it is told at once and briefly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peftctl.errors import DataError, Problem

SHOWN = 10

_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


class Problems:
    """Keeps the first problems, counts the others, and raises them together."""

    def __init__(self) -> None:
        self.shown: list[Problem] = []
        self.more = 0

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.shown) + self.more

    def add(self, where: str, message: str, hint: str = "") -> None:
        """Note one problem."""
        self.extend([Problem(where, message, hint)])

    def extend(self, problems: Iterable[Problem]) -> None:
        """Note several problems."""
        for problem in problems:
            if len(self.shown) < SHOWN:
                self.shown.append(problem)
            else:
                self.more += 1

    def raise_if_any(self) -> None:
        """Raise DataError where there was a problem."""
        if self.more:
            raise DataError([*self.shown, Problem("data", f"and {self.more} more problems like these")])
        if self.shown:
            raise DataError(self.shown)


def kind(value: Any) -> str:
    """Return what a value is, in the words of a JSON file."""
    return _KINDS.get(type(value), type(value).__name__)


def wrong(where: str, message: str, hint: str = "") -> DataError:
    """Return the error of one problem."""
    return DataError([Problem(where, message, hint)])
