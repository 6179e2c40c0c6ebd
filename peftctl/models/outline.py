"""A model's module tree: shapes, counts and marks, with blocks of equal shape as one row, `layers.{0..29}`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class Node:
    """One row of the tree: a module, or several of equal shape.

    Args:
        name: Whole name, with the numbers of equal blocks as `{0..3}`.
        label: Its part below the row above.
        depth: Rows above it that it belongs to.
        kind: Class of the module.
        shape: Of its own weights, e.g. `64x32 + 64`; empty for a container.
        tied: The weight that its own weight is the same tensor as.
        marks: Names of the selections that it is in.
        parameters: Of the row and all below it; tied weights count at their first place only.
        count: Modules that the row stands for.
    """

    name: str
    label: str
    depth: int
    kind: str
    shape: str
    tied: str
    marks: tuple[str, ...]
    parameters: int
    count: int = 1
    children: list[Node] = field(default_factory=list)

    def walk(self) -> Iterable[Node]:
        """Yield this row and all below it, as they are shown."""
        yield self
        for child in self.children:
            yield from child.walk()


def outline(model: nn.Module, selections: Mapping[str, Collection[str]]) -> list[Node]:
    """Return the rows of a model's tree; modules without any weight are left out.

    Args:
        model: May be on the meta device.
        selections: Name of a selection -> names of the modules in it.
    """
    builder = _Builder(model, selections)
    return [row for child in builder.children(model, "", "", 0) for row in child.walk()]


class _Builder:
    def __init__(self, model: nn.Module, selections: Mapping[str, Collection[str]]):
        self.selections = {name: set(modules) for name, modules in selections.items()}
        self.first: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.first.setdefault(id(parameter), name)

    def children(self, module: nn.Module, path: str, shown: str, depth: int) -> list[Node]:
        """Return the rows below a module, equal numbered ones as one."""
        groups: dict[Any, tuple[Node, list[int]]] = {}
        for label, child in module.named_children():
            if next(child.parameters(), None) is None:
                continue
            for node in self._rows(child, _join(path, label), _join(shown, label), label, depth):
                if not label.isdigit():
                    groups[node.label] = (node, [])
                    continue
                first, numbers = groups.setdefault((node.label[len(label) :], _signature(node)), (node, []))
                if numbers:
                    _add(first, node)
                numbers.append(int(label))
        for node, numbers in groups.values():
            if len(numbers) > 1:
                _rename(node, shown, ranges(numbers) + node.label[len(str(numbers[0])) :])
        return [node for node, _ in groups.values()]

    def _rows(self, module: nn.Module, path: str, shown: str, label: str, depth: int) -> list[Node]:
        """Return the row of a module; of a plain list of modules, those of its members, under its name."""
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        if isinstance(module, nn.ModuleList) and not own:
            rows = self.children(module, path, shown, depth)
            for row in rows:
                row.label = f"{label}.{row.label}"
            return rows
        below = self.children(module, path, shown, depth + 1)
        tied = {name: self.first[id(p)] for name, p in own.items() if self.first[id(p)] != _join(path, name)}
        node = Node(
            name=shown,
            label=label,
            depth=depth,
            kind=type(module).__name__,
            shape=" + ".join("x".join(map(str, p.shape)) for p in own.values()),
            tied=", ".join(tied.values()),
            marks=tuple(name for name, modules in self.selections.items() if path in modules),
            parameters=sum(p.numel() for name, p in own.items() if name not in tied)
            + sum(child.parameters for child in below),
            children=below,
        )
        return [node]


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as `{0..3,5}`, a single one as itself."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    parts = [str(low) if low == high else f"{low}..{high}" for low, high in runs]
    return parts[0] if len(parts) == 1 and runs[0][0] == runs[0][1] else "{" + ",".join(parts) + "}"


def collapse(names: Iterable[str]) -> dict[str, str]:
    """Return each name with its block number replaced by those of all names that differ in it alone.

    Of a name with several numbers the first counts: `layers.0.experts.1` and `layers.1.experts.1` become
    `layers.{0..1}.experts.1`.
    """
    split = {name: _at_number(name) for name in names}
    numbers: dict[tuple[str, str], list[int]] = {}
    for before, number, after in split.values():
        if number is not None:
            numbers.setdefault((before, after), []).append(number)
    return {
        name: name if number is None else f"{before}{ranges(numbers[before, after])}{after}"
        for name, (before, number, after) in split.items()
    }


def _at_number(name: str) -> tuple[str, int | None, str]:
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return "".join(f"{p}." for p in parts[:i]), int(part), "".join(f".{p}" for p in parts[i + 1 :])
    return name, None, ""


def _signature(node: Node) -> Any:
    below = tuple((child.label, _signature(child)) for child in node.children)
    return node.kind, node.shape, node.tied, node.marks, below


def _add(node: Node, other: Node) -> None:
    """Count a module of the same signature into a row."""
    node.parameters += other.parameters
    node.count += other.count
    for mine, its in zip(node.children, other.children, strict=True):
        _add(mine, its)


def _rename(node: Node, parent: str, label: str) -> None:
    """Give a row, and the names of all below it, another last part."""
    old, node.label = node.name, label
    for row in node.walk():
        row.name = _join(parent, label) + row.name[len(old) :]


def _join(path: str, label: str) -> str:
    return f"{path}.{label}" if path else label
