"""Which methods are proven with which storage of the base and which engine; `scripts/probe_matrix.py` finds out."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("matrix.json")
ENGINES = {
    "single": "one process",
    "ddp": "DDP",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "fsdp": "FSDP",
}
STORAGES = ("float32", "bfloat16", "nf4", "int8")


@cache
def rows() -> Mapping[str, Mapping[str, Mapping[str, str]]]:
    """Return method -> its code's hash, and its cells: `storage/engine` -> why not, or nothing where it holds."""
    return json.loads(_FILE.read_text(encoding="utf-8")) if _FILE.is_file() else {}


def refusal(method: str, storage: str, engine: str) -> str | None:
    """Return why a combination does not hold; None where it does, or where neither it nor float32 has been tried.

    Args:
        method: Its name.
        storage: One of `STORAGES`, of the base's weights.
        engine: A key of `ENGINES`.
    """
    cells = rows().get(method, {}).get("cells", {})
    # What float32 can't do, no other storage can.
    return cells.get(f"{storage}/{engine}") or cells.get(f"float32/{engine}") or None


def up_to_date(method: str) -> bool:
    """Tell whether a method's cells were made by its code as it is now."""
    return rows().get(method, {}).get("code") == _code(method)


def record(method: str, cells: Mapping[str, str]) -> None:
    """Keep the cells of a method; those of other storages and engines stay where the code is the same."""
    content: dict[str, Any] = dict(rows())
    earlier = content.get(method, {}).get("cells", {}) if up_to_date(method) else {}
    content[method] = {"code": _code(method), "cells": {**earlier, **cells}}
    _FILE.write_text(json.dumps(dict(sorted(content.items())), indent=1) + "\n", encoding="utf-8")
    rows.cache_clear()


def code_of(file: Path) -> bytes:
    """Return what a module does: its code without comments, docstrings and a method's card."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = vars(node).get("body")
        if isinstance(body, list):
            vars(node)["body"] = [line for line in body if not _is_text(line)] or [ast.Pass()]
    return ast.unparse(tree).encode()


def _is_text(line: ast.stmt) -> bool:
    if isinstance(line, ast.Assign):
        return isinstance(line.targets[0], ast.Name) and line.targets[0].id == "card"
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


def _code(method: str) -> str:
    return hashlib.sha256(code_of(Path(__file__).with_name(f"{method}.py"))).hexdigest()[:12]
