"""What `peftctl model` returns: the same content for programs and as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peftctl.artifacts.ranks import Adapted
from peftctl.console import figure

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Title, column heads, rows."""


@dataclass(frozen=True)
class Report:
    """What was found.

    Args:
        content: Plain data.
        tables: The same to look at.
        notes: Lines below the tables.
    """

    content: dict[str, Any]
    tables: Sequence[Table]
    notes: Sequence[str] = ()


def by(shape: Iterable[int]) -> str:
    """Return a shape as `64x32`."""
    return "x".join(map(str, shape))


def share(part: int, whole: int) -> str:
    """Return a part in percent."""
    return f"{part / whole:.3%}"


def ranks_report(title: str, rows: Sequence[Adapted], content: dict[str, Any], notes: Sequence[str] = ()) -> Report:
    """Return the report of what an adapter adds, or of what a recipe trains."""
    low_rank, rest = [r for r in rows if r.r is not None], [r for r in rows if r.r is None]
    tables: list[Table] = []
    if low_rank:
        cells = [
            [r.name, str(r.count), by(r.shape), str(r.r), *map(figure, (r.alpha, r.scale, r.parameters))]
            for r in low_rank
        ]
        tables.append((title, ["low-rank update of", "modules", "shape", "r", "alpha", "scale", "parameters"], cells))
    if rest:
        cells = [[r.name, str(r.count), by(r.shape), figure(r.parameters)] for r in rest]
        tables.append(("" if tables else title, ["trained whole", "tensors", "shape", "parameters"], cells))
    if not rows:
        tables.append((title, ["nothing trains"], []))
    data = content | {"parameters": sum(r.parameters for r in rows), "adapted": [asdict(r) for r in rows]}
    return Report(data, tables, notes)
