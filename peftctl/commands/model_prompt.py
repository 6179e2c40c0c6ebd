"""What `peftctl model` shows of a soft prompt: the vocabulary tokens nearest to each of its virtual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftctl.artifacts.load import tokenizer_of
from peftctl.artifacts.locate import Artefact
from peftctl.artifacts.nearest import Neighbours, nearest, prompts, token_table
from peftctl.artifacts.ranks import virtual_tokens
from peftctl.commands.model_report import Report, Table
from peftctl.console import figure


def prompt_report(artefact: Artefact, k: int, report: Report) -> Report:
    """Add the nearest tokens to the report of an adapter; other adapters' reports stay as they are.

    Args:
        artefact: An adapter with weights.
        k: How many tokens to show.
        report: What is known of the adapter's tensors.
    """
    assert artefact.folder is not None  # it has weights
    where = virtual_tokens(artefact.folder)
    if where is None:
        return report
    if where == "prefix":
        note = "a prefix is keys and values of every layer, so no vocabulary token is near it"
        return Report(report.content, report.tables, [*report.notes, note])
    tokenizer, table = tokenizer_of(artefact), token_table(artefact)
    tables, data = [], []
    for task, prompt in prompts(artefact.folder).items():
        found = nearest(prompt, table, k)
        tables.append(_table(task, found, tokenizer))
        data += [_as_data(task, i, neighbours, tokenizer) for i, neighbours in enumerate(found)]
    return Report(report.content | {"virtual_tokens": data}, [*report.tables, *tables], report.notes)


def _table(task: str, found: Sequence[Neighbours], tokenizer: Any) -> Table:
    title = "nearest vocabulary tokens" + (f" of {task}" if task else "")
    rows = [
        [str(i), figure(n.norm), _listed(n.cosine, tokenizer), _listed(n.l2, tokenizer)] for i, n in enumerate(found)
    ]
    return title, ["token", "length", "by cosine", "by distance"], rows


def _as_data(task: str, index: int, neighbours: Neighbours, tokenizer: Any) -> dict[str, Any]:
    kinds = {"cosine": neighbours.cosine, "l2": neighbours.l2}
    lists = {
        kind: [{"id": i, "text": text_of(tokenizer, i), "value": value} for i, value in tokens]
        for kind, tokens in kinds.items()
    }
    return {"task": task or None, "index": index, "norm": neighbours.norm, **lists}


def _listed(tokens: Sequence[tuple[int, float]], tokenizer: Any) -> str:
    return "  ".join(f"{text_of(tokenizer, i)!r} {figure(value)}" for i, value in tokens)


def text_of(tokenizer: Any, token_id: int) -> str:
    """Return the text of a token; of one that is a part of a character only, its name in the vocabulary."""
    text = tokenizer.decode([token_id])
    if text and "\ufffd" not in text:
        return text
    return tokenizer.convert_ids_to_tokens(token_id) or f"<id {token_id}>"  # embeddings are often padded
