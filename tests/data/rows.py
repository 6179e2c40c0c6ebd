"""Short ways to write examples, and to read encoded rows."""

from __future__ import annotations

from typing import Any

from peftctl.data.encode import IGNORED, EncodedRow
from peftctl.data.formats import Example, to_examples
from peftctl.data.sources import Row
from peftctl.recipe.schema import DataSection


def section(**keys: Any) -> DataSection:
    return DataSection(**{"train": "rows.jsonl", "max_length": 400, **keys})


def example(data: DataSection | None = None, **fields: Any) -> Example:
    """One row, of format messages unless the section says otherwise."""
    return to_examples([Row(fields, "rows.jsonl:1")], data or section())[0]


def user(text: str, **extra: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **extra}


def assistant(text: str | None, **extra: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **extra}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


TWO_TURNS = [user("Hi there"), assistant("Hello"), user("How are you"), assistant("Fine thanks")]
ONE_TURN = TWO_TURNS[:2]


def readable(row: EncodedRow, tokenizer) -> str:
    """`token:id`, with a star where the token is trained on; newlines are shown as Ċ."""
    shown = []
    for token, label in zip(row.input_ids, row.labels, strict=True):
        assert label in (IGNORED, token)
        text = tokenizer.convert_ids_to_tokens(token).replace("\n", "Ċ")
        shown.append(f"{text}:{token}{'' if label == IGNORED else '*'}")
    return " ".join(shown)


def one_line(text: str) -> str:
    return " ".join(text.split())


def trained(row: EncodedRow) -> list[int]:
    return [label for label in row.labels if label != IGNORED]
