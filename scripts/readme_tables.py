"""Write README's tables of recipe keys and of methods from the schema and the cards.

    python scripts/readme_tables.py

A section's table follows its schema; methods stand in two tables, what each is and which keys it has.
tests/test_readme.py fails where they are out of date.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

README = Path(__file__).resolve().parents[1] / "README.md"


def main() -> None:
    README.write_text(refreshed(README.read_text(encoding="utf-8")), encoding="utf-8")


def refreshed(text: str) -> str:
    """Return the README's text with every generated table made anew."""
    from peftctl.commands.methods import describe_all
    from peftctl.methods import registry
    from peftctl.recipe.schema import Recipe

    lines = text.splitlines()
    for section, field in Recipe.model_fields.items():
        if section != "method":
            put(lines, f"| `{section}:` |", [key_row(*item) for item in field.annotation.model_fields.items()])  # type: ignore[union-attr]
    put(lines, "| method | trains |", [method_row(card) for card in describe_all()])
    keys = {name: registry.get(name).Config.model_fields for name in registry.names()}
    put(lines, "| keys of |", [f"| `{name}` | {brief(fields)} |" for name, fields in keys.items() if len(fields) > 1])
    return "\n".join(lines) + "\n"


def put(lines: list[str], head: str, rows: list[str]) -> None:
    """Replace the rows of the table whose head starts so, in place."""
    first = next(i for i, line in enumerate(lines) if line.startswith(head)) + 2
    last = first
    while last < len(lines) and lines[last].startswith("| `"):
        last += 1
    lines[first:last] = rows


def key_row(key: str, field: FieldInfo) -> str:
    return f"| `{key}` | {default(field)} | {' '.join((field.description or '').split()).replace('|', '/')} |"


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value: Any = field.get_default(call_default_factory=True)
    if value is None:
        return "–"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def brief(fields: Mapping[str, FieldInfo]) -> str:
    """Return keys with their defaults in a line."""
    return ", ".join(f"`{key}` {default(field).strip('`')}" for key, field in fields.items() if key != "name")


def method_row(card: Mapping[str, Any]) -> str:
    counted, model = card["recipe"]["trainable"], card["recipe"]["model"]
    number = "?" if counted is None else f"{counted:,}" + ("" if model == "smollm2-135m" else f" ({model})")
    cells = [
        f"`{card['name']}`",
        card["trains"],
        number,
        "yes" if card["mergeable"] else "no",
        "yes" if "4bit" in card["supports"] else "no",
        ", ".join(card["tasks"]),
        card["paper"].replace(", arXiv ", ", "),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
