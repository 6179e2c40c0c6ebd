"""Nodes of a recipe's tree: every key and value knows its place, and nothing changes in place.

An override or an implied value makes a new tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peftctl.errors import Problem, RecipeError


class _Broken:
    """Stands for a value that could not be read."""


BROKEN = _Broken()


@dataclass(frozen=True)
class Place:
    """Where something stands.

    Args:
        text: `file:line:column` or `command line: KEY`.
        order: Sorts places: the file's by position, then the command line's by theirs.
    """

    text: str
    order: tuple[int, ...]

    @classmethod
    def in_file(cls, file: str, line: int, column: int) -> Place:
        """Return a place in a file; line and column count from 1."""
        return cls(f"{file}:{line}:{column}", (0, line, column))

    @classmethod
    def on_command_line(cls, key: str, index: int) -> Place:
        """Return the place of the override number `index`."""
        return cls(f"command line: {key}", (1, index))


@dataclass(frozen=True)
class Finding:
    """A problem whose place can still be sorted."""

    place: Place
    message: str
    hint: str = ""


@dataclass(frozen=True)
class Scalar:
    """A single value.

    Args:
        value: Text, number, boolean, None or BROKEN.
        place: Where the value begins.
        quoted: Written in quotes or as a block of text.
        raw: The text to take where the schema wants a text; for values from the command line or the environment.
        reason: Why the value is BROKEN, where that is not among the findings because `raw` may do.
    """

    value: Any
    place: Place
    quoted: bool = False
    raw: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Items:
    """A list of nodes."""

    nodes: tuple[Node, ...]
    place: Place
    raw: str | None = None


@dataclass(frozen=True)
class Entry:
    """A key of a table: where the key stands, and its value."""

    place: Place
    node: Node


@dataclass(frozen=True)
class Table:
    """A mapping; the order of keys is kept."""

    entries: Mapping[str, Entry]
    place: Place
    raw: str | None = None


Node = Scalar | Items | Table
Path = tuple[str | int, ...]


def raise_findings(findings: Iterable[Finding]) -> None:
    """Raise all findings as one RecipeError, by place and each once; return where there are none."""
    ordered = sorted(findings, key=lambda finding: finding.place.order)
    problems = dict.fromkeys(Problem(f.place.text, _without_place(f), f.hint) for f in ordered)
    if problems:
        raise RecipeError(list(problems))


def _without_place(finding: Finding) -> str:
    """Return the message without the key where the place names it already, as on the command line."""
    key, _, rest = finding.message.partition(": ")
    return rest if finding.place.text == f"command line: {key}" else finding.message


def plain(node: Node) -> Any:
    """Return the node as Python values."""
    if isinstance(node, Table):
        return {key: plain(entry.node) for key, entry in node.entries.items()}
    if isinstance(node, Items):
        return [plain(child) for child in node.nodes]
    return node.value


def wrap(value: Any, place: Place) -> Node:
    """Return Python values as a node whose parts all stand at `place`."""
    if isinstance(value, Mapping):
        return Table({key: Entry(place, wrap(item, place)) for key, item in value.items()}, place)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return Items(tuple(wrap(item, place) for item in value), place)
    return Scalar(value, place)


def find(node: Node, path: Path) -> Node | None:
    """Return the node at a path, or None."""
    for step in path:
        if isinstance(node, Table) and step in node.entries:
            node = node.entries[str(step)].node
        elif isinstance(node, Items) and isinstance(step, int) and step < len(node.nodes):
            node = node.nodes[step]
        else:
            return None
    return node


def key_place(root: Table, path: Path) -> Place:
    """Return where the last key on a path stands that exists; a list's element stands where its value does."""
    node: Node | None = root
    place = root.place
    for step in path:
        if isinstance(node, Table) and step in node.entries:
            place, node = node.entries[str(step)].place, node.entries[str(step)].node
        else:
            node = find(node, (step,)) if node else None
            place = node.place if node else place
    return place


def dotted(path: Path) -> str:
    """Return a path as users write it, e.g. `data.train[1]`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def is_reported(node: Node) -> bool:
    """Tell whether the node could not be read and the findings say why."""
    return isinstance(node, Scalar) and node.value is BROKEN and not node.reason


def put(table: Table, path: tuple[str, ...], entry: Entry) -> Table:
    """Return the table with an entry set; sections on the way that are missing or empty are made.

    Raises:
        KeyError: The path leads through a value or a list; the argument is that part of the path.
    """
    head, rest = path[0], path[1:]
    if rest:
        below = table.entries[head].node if head in table.entries else Scalar(None, entry.place)
        if isinstance(below, Scalar) and below.value is None:
            below = Table({}, below.place)
        if not isinstance(below, Table):
            raise KeyError((head,))
        try:
            made = put(below, rest, entry)
        except KeyError as error:
            raise KeyError((head, *error.args[0])) from None
        place = table.entries[head].place if head in table.entries else entry.place
        entry = Entry(place, made)
    return replace(table, entries={**table.entries, head: entry})


def drop(table: Table, path: tuple[str, ...]) -> Table:
    """Return the table without the key at a path; the same table where there is none."""
    head, rest = path[0], path[1:]
    if head not in table.entries:
        return table
    entries = dict(table.entries)
    if not rest:
        del entries[head]
        return replace(table, entries=entries)
    below = entries[head].node
    if isinstance(below, Table):
        entries[head] = replace(entries[head], node=drop(below, rest))
    return replace(table, entries=entries)
