"""Encoded rows on disk, keyed by everything that they follow from.

The key covers the rows' content, the tokenizer with its chat template, the keys of `data:` that encoding reads, the
code that encodes, and the versions of the libraries below it; so a changed template or a changed line of code is
never answered with old rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from peftctl.data.encode import EncodedRow
from peftctl.data.formats import Example
from peftctl.recipe.schema import DataSection, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CODE = (
    "conversations.py",
    "turns.py",
    "rendering.py",
    "encode.py",
    "pairs.py",
    "classes.py",
    "choices.py",
    "cache.py",
)
_LIBRARIES = ("transformers", "tokenizers", "jinja2")
_FLAGS = ("truncated", "paired", "prompt_cut", "classes")


def cache_file(
    root: Path,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    data: DataSection,
    task: Task = "causal_lm",
) -> Path:
    """Return where the encoded rows of these examples are kept under `root`."""
    digest = hashlib.sha256()
    read = [task, data.format, data.template, data.max_length, data.loss_on, data.labels]
    code = [hashlib.sha256((Path(__file__).parent / name).read_bytes()).hexdigest() for name in _CODE]
    for part in (read, code, [version(name) for name in _LIBRARIES], tokenizer_content(tokenizer)):
        digest.update(json.dumps(part).encode())
    for example in examples:
        digest.update(json.dumps(_content(example)).encode())
    return root / "tokens" / f"{digest.hexdigest()}.safetensors"


def load_rows(file: Path, examples: Sequence[Example]) -> list[list[EncodedRow]] | None:
    """Return the rows of each example; None where the file is missing or is not what was written."""
    try:
        with safe_open(file, framework="numpy") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        if metadata.get("checksum") != _checksum(tensors):
            return None
        reasons = json.loads(metadata["reasons"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    groups: list[list[EncodedRow]] = [[] for _ in examples]
    ids, labels = _cut(tensors["ids"], tensors["length"]), _cut(tensors["labels"], tensors["label_length"])
    facts = (tensors[name].tolist() for name in ("source", "wrong", "reason", *_FLAGS))
    for row_ids, row_labels, source, wrong, reason, *flags in zip(ids, labels, *facts, strict=True):
        state: dict[str, Any] = dict(zip(_FLAGS, map(bool, flags), strict=True))
        row = EncodedRow(row_ids, row_labels, examples[source].where, dropped_reason=reasons[reason], **state)
        if wrong:  # an answer to the prompt of the row before
            right = groups[source].pop()
            row = replace(right, wrong=(*right.wrong, row))
        groups[source].append(row)
    return groups


def save_rows(file: Path, groups: Sequence[Sequence[EncodedRow]]) -> None:
    """Write the rows aside and rename; a cache that can't be written costs time in the next run and nothing else."""
    marked = [
        (each, i, each is not row) for i, group in enumerate(groups) for row in group for each in (row, *row.wrong)
    ]
    rows = [row for row, _, _ in marked]
    reasons: list[str | None] = [None, *sorted({row.dropped_reason for row in rows if row.dropped_reason})]
    tensors = {
        "ids": _flat(row.input_ids for row in rows),
        "labels": _flat(row.labels for row in rows),
        "source": np.array([source for _, source, _ in marked], dtype=np.int64),
        "wrong": np.array([wrong for _, _, wrong in marked], dtype=np.int64),
        "length": np.array([len(row.input_ids) for row in rows], dtype=np.int64),
        "label_length": np.array([len(row.labels) for row in rows], dtype=np.int64),
        "reason": np.array([reasons.index(row.dropped_reason) for row in rows], dtype=np.int64),
        **{flag: np.array([getattr(row, flag) for row in rows], dtype=np.int64) for flag in _FLAGS},
    }
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    with contextlib.suppress(OSError, SafetensorError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, aside, {"reasons": json.dumps(reasons), "checksum": _checksum(tensors)})
            os.replace(aside, file)
        finally:
            aside.unlink(missing_ok=True)


def _flat(sequences: Iterable[list[int]]) -> np.ndarray:
    return np.array([token for sequence in sequences for token in sequence], dtype=np.int32)


def _cut(flat: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    bounds = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    return [flat[first:last].tolist() for first, last in pairwise(bounds)]


def _checksum(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def _content(example: Example) -> list[Any]:
    """Return what encoding reads of an example: all but its place."""
    messages = [[m.role, m.content, m.train, m.extra] for m in example.messages or []]
    texts = [example.prompt, example.completion, example.text]
    return [messages, example.tools, *texts, example.label, example.tokens, example.tags, example.wrong_answers]


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Return all of a tokenizer that tokens follow from."""
    if tokenizer.is_fast:
        model = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        # State that calls leave behind; we neither pad nor truncate there.
        model.update(padding=None, truncation=None)
    else:
        model = sorted(tokenizer.get_vocab().items())
    added = sorted((i, repr(token)) for i, token in tokenizer.added_tokens_decoder.items())
    special = [str(tokenizer.bos_token), str(tokenizer.eos_token), sorted(map(str, tokenizer.all_special_tokens))]
    template = tokenizer.chat_template
    # Templates may write today's date.
    today = str(date.today()) if "strftime_now" in str(template) else None
    return [type(tokenizer).__name__, model, added, special, template, today]
