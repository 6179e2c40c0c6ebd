"""`peftctl model`: a model's modules, shapes and counts, from its configuration alone."""

from __future__ import annotations

from typing import Any

import yaml
from torch import nn

from peftctl.methods._targets import matched_modules
from peftctl.models.load import meta_model
from peftctl.recipe.schema import ModelSection


def describe(name: str, targets: str | None = None) -> dict[str, Any]:
    """Return the leaf modules of a model; blocks of equal shape are shown once, as `layers.{0..29}`.

    Args:
        name: Hub id, directory, .gguf file or alias.
        targets: A `target_modules` value (YAML), to mark what it selects.
    """
    model = meta_model(ModelSection(name_or_path=name))
    selected = set(matched_modules(model, yaml.safe_load(targets))) if targets else set()
    grouped: dict[tuple[str, ...], dict[str, Any]] = {}
    for path, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if not own:
            continue
        pattern, number = _pattern(path)
        key = (pattern, type(module).__name__, _shape(module), str(path in selected))
        row = grouped.setdefault(
            key,
            {
                "name": pattern,
                "type": type(module).__name__,
                "shape": _shape(module),
                "parameters": 0,
                "count": 0,
                "selected": "selected" if path in selected else "",
                "first": number,
            },
        )
        row["parameters"] += sum(p.numel() for p in own)
        row["count"] += 1
    modules = [_named(row) for row in grouped.values()]
    return {
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "selected_modules": len(selected),
        "modules": modules,
    }


def _pattern(path: str) -> tuple[str, int]:
    """Return the path with its first block number as `*`, and that number."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join([*parts[:i], "*", *parts[i + 1 :]]), int(part)
    return path, -1


def _named(row: dict[str, Any]) -> dict[str, Any]:
    first = row.pop("first")
    if row["count"] > 1:
        row["name"] = row["name"].replace("*", f"{{{first}..{first + row['count'] - 1}}}", 1)
    elif first >= 0:
        row["name"] = row["name"].replace("*", str(first), 1)
    return row


def _shape(module: nn.Module) -> str:
    return " + ".join("x".join(map(str, p.shape)) for p in module.parameters(recurse=False))
