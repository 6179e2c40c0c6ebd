"""Labelled texts and tagged words -> tokens and class numbers; and which classes there are.

A text has one class. Words are joined by spaces and tokenised as that text, so that a model sees what it saw in
pretraining, whatever its tokenizer makes of a space; the first piece of a word carries its tag, as in BERT (Devlin et
al. 2018, arXiv 1810.04805, section 5.3), and nothing else has a label. Either gets the special tokens that the
tokenizer's own rules put around a text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from peftctl.data.encode import IGNORED, EncodedRow
from peftctl.data.formats import Example
from peftctl.data.problems import Problems, wrong
from peftctl.errors import DataError
from peftctl.recipe.schema import DataSection, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 12
"""Labels that a message names."""


def with_labels(data: DataSection, train: Sequence[Example], held_out: Sequence[Example]) -> DataSection:
    """Return the section with the classes by number: its own, else those of the training rows in sorted order.

    Raises:
        DataError: There is only one class, or a row has none of them.
    """
    given = data.labels is not None
    if not given:
        found = sorted({str(label) for example in train for label in _labels(example)}, key=_order)
        if len(found) < 2:
            what = f"all have {found[0]!r}" if found else "they have none"
            raise wrong("data.train", f"expected rows of at least two classes, but {what}", "add rows of another class")
        data = data.model_copy(update={"labels": found})
    numbers = Numbers(data)
    problems = Problems()
    for example in (*{id(example): example for example in train}.values(), *held_out):
        for label in _labels(example):
            if numbers.of(label) is None or not (given or str(label) in numbers.names):
                problems.extend(numbers.unknown(label, example.where).problems)
                break
    problems.raise_if_any()
    return data


class Numbers:
    """The number of each class of `data.labels`."""

    def __init__(self, data: DataSection):
        if not data.labels:
            raise wrong("data.labels", "expected the classes of the model's head, got none", "list them")
        self.names = [str(label) for label in data.labels]
        self._by_name = {name: i for i, name in enumerate(self.names)}
        # Rows of some data sets number the classes that their card lists.
        self._counts = not any(name.lstrip("-").isdecimal() for name in self.names)

    def of(self, label: str | int) -> int | None:
        """Return a label's number; None where it is no class."""
        if isinstance(label, int) and self._counts:
            return label if 0 <= label < len(self.names) else None
        return self._by_name.get(str(label))

    def required(self, label: str | int, where: str) -> int:
        """Return a label's number.

        Raises:
            DataError: It is no class.
        """
        found = self.of(label)
        if found is None:
            raise self.unknown(label, where)
        return found

    def unknown(self, label: str | int, where: str) -> DataError:
        """Return the error of a label that is no class."""
        more = f" and {len(self.names) - _SHOWN} more" if len(self.names) > _SHOWN else ""
        known = ", ".join(self.names[:_SHOWN]) + more
        return wrong(where, f"label {label!r} is not one of {known}", "correct it, or list all labels in data.labels")


class TextEncoder:
    """Encodes labelled texts: one row a text, whose `labels` are its class alone.

    Raises:
        DataError: The section has no classes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataSection):
        self.tokenizer = tokenizer
        self.max_length = data.max_length
        self.numbers = Numbers(data)

    def encode(self, example: Example) -> list[EncodedRow]:
        """Return the row of an example; see `EncodedRow.dropped_reason`."""
        assert example.label is not None
        label = self.numbers.required(example.label, example.where)
        if not (example.text or "").strip():
            return [_dropped(example.where, "empty text")]
        ids = list(self.tokenizer(example.text, verbose=False)["input_ids"])
        kept, closing = _shortened(ids, self.tokenizer, self.max_length)
        if not _anything(kept, self.tokenizer):
            return [_dropped(example.where, "no room for text within max_length")]
        return [EncodedRow(kept + closing, [label], example.where, classes=True, prompt_cut=len(ids) > self.max_length)]

    def question(self, example: Example) -> None:
        """Return None: nothing is generated."""


class TagEncoder:
    """Encodes tagged words: `labels` are as many as tokens, the tag at the first piece of a word, else -100.

    Raises:
        DataError: The section has no classes, or the tokenizer does not tell where its tokens lie in the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataSection):
        if not tokenizer.is_fast:
            raise wrong("model.task", "token_cls needs a fast tokenizer (tokenizer.json)", "take another model")
        self.tokenizer = tokenizer
        self.max_length = data.max_length
        self.numbers = Numbers(data)

    def encode(self, example: Example) -> list[EncodedRow]:
        """Return the row of an example; see `EncodedRow.dropped_reason`."""
        tags = [self.numbers.required(tag, example.where) for tag in example.tags or ()]
        if not "".join(example.tokens or ()).strip():
            return [_dropped(example.where, "no words")]
        ids, labels = self._aligned(example.tokens or [], tags)
        kept, closing = _shortened(ids, self.tokenizer, self.max_length)
        inside = labels[: len(kept)]
        lost = any(label != IGNORED for label in labels[len(kept) :])
        if all(label == IGNORED for label in inside):
            return [_dropped(example.where, "no room for words within max_length")]
        labels = inside + [IGNORED] * len(closing)
        return [EncodedRow(kept + closing, labels, example.where, truncated=lost, classes=True)]

    def question(self, example: Example) -> None:
        """Return None: nothing is generated."""

    def _aligned(self, words: Sequence[str], tags: Sequence[int]) -> tuple[list[int], list[int]]:
        encoded = self.tokenizer(" ".join(words), return_offsets_mapping=True, verbose=False)
        starts = [0, *accumulate(len(word) + 1 for word in words)]
        labels = []
        last = -1
        for first, end in encoded["offset_mapping"]:
            # By its last character: some tokens begin with the space before a word.
            word = bisect_right(starts, end - 1) - 1
            begins = end > first and word > last and end - 1 < starts[word + 1] - 1
            labels.append(tags[word] if begins else IGNORED)
            last = word if begins else last
        return list(encoded["input_ids"]), labels


def class_encoder(task: Task, tokenizer: PreTrainedTokenizerBase, data: DataSection) -> TextEncoder | TagEncoder:
    """Return what makes rows for a classification task.

    Raises:
        DataError: The section's format is another task's, or it has no classes.
    """
    wanted = "labelled_text" if task == "seq_cls" else "tokens_tags"
    if data.format != wanted:
        raise wrong("data.format", f"{data.format} does not fit model.task {task}", f"use {wanted}")
    return TextEncoder(tokenizer, data) if task == "seq_cls" else TagEncoder(tokenizer, data)


def _labels(example: Example) -> Iterable[str | int]:
    return (example.tags or ()) if example.label is None else (example.label,)


def _order(label: str) -> tuple[bool, int, str]:
    """Sort whole numbers by value, before other labels."""
    number = label.lstrip("-").isdecimal()
    return (not number, int(label) if number else 0, label)


def _shortened(ids: list[int], tokenizer: PreTrainedTokenizerBase, most: int) -> tuple[list[int], list[int]]:
    """Return the tokens that fit, and the special tokens that close the row, which are kept in any case."""
    special = set(tokenizer.all_special_ids)
    end = len(ids)
    while end and ids[end - 1] in special:
        end -= 1
    closing = ids[end:]
    return ids[: max(0, min(end, most - len(closing)))], closing


def _anything(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    special = set(tokenizer.all_special_ids)
    return any(token not in special for token in ids)


def _dropped(where: str, reason: str) -> EncodedRow:
    return EncodedRow([], [], where, dropped_reason=reason, classes=True)
