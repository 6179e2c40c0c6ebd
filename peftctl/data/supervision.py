"""What of a data set is trained on, known before the first step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from peftctl.data.problems import wrong
from peftctl.recipe.schema import DataSection

_PLACES = 3
_CLASSES = 20
"""Labels that a line names."""


@dataclass(frozen=True)
class Dropped:
    """Rows dropped for one reason.

    Args:
        count: How many.
        places: Where the first of them are.
    """

    count: int
    places: tuple[str, ...]


@dataclass(frozen=True)
class SourceReport:
    """What one entry of `data.sources` gives to an epoch.

    Args:
        path: Its files or hub id.
        weight: How often an epoch sees each of its rows.
        rows: Rows that are trained on, copies included.
        tokens: Their tokens, without padding.
        share: tokens / those of all sources.
        supervised_tokens: Tokens that are predicted and trained on.
        supervised_share: supervised_tokens / tokens.
    """

    path: str | list[str]
    weight: float
    rows: int
    tokens: int
    share: float
    supervised_tokens: int
    supervised_share: float

    def line(self, number: int) -> list[str]:
        """Return a (name, value) pair to show."""
        paths = [self.path] if isinstance(self.path, str) else self.path
        name = os.path.basename(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        return [
            f"source {number}: {name}, weight {self.weight:g}",
            f"{self.rows:,} rows, {self.tokens:,} tokens ({self.share:.1%} of all), "
            f"{self.supervised_tokens:,} trained on ({self.supervised_share:.1%})",
        ]


@dataclass(frozen=True)
class SupervisionReport:
    """Figures of a data set after encoding; lengths and tokens count kept rows only.

    Of `data.sources` they are those of an epoch: a row that comes twice counts twice.

    Args:
        rows: Rows after encoding; a conversation can give several.
        kept: Rows with a token to train on.
        dropped: Reason -> the others.
        tokens: Tokens of all rows, without padding.
        supervised_tokens: Tokens that are predicted and trained on.
        share: supervised_tokens / tokens.
        truncated_answers: Rows whose answers `max_length` cut.
        cut_prompts: Rows of which `max_length` cut what the encoder of an encoder-decoder reads.
        eos_supervised: Share of rows whose last trained token is EOS or an end-of-turn token.
        doubled_bos: Rows that begin with two BOS tokens.
        pad_is_eos: Whether padding is the EOS token; harmless here, as labels never follow from padding.
        classes: Label -> how many rows, or words, have it; empty for language models.
        split_conversations: Conversations of several rows, because earlier turns read differently in later prompts.
        longest: Tokens of the longest row.
        median: Median of the tokens of a row.
        p95: 95th percentile of the tokens of a row.
        sources: The same by source; empty where there are no `data.sources`.
    """

    rows: int
    kept: int
    dropped: dict[str, Dropped]
    tokens: int
    supervised_tokens: int
    share: float
    truncated_answers: int
    cut_prompts: int
    eos_supervised: float
    doubled_bos: int
    pad_is_eos: bool
    split_conversations: int
    longest: int
    median: int
    p95: int
    sources: tuple[SourceReport, ...] = ()
    classes: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[list[str]]:
        """Return (name, value) pairs to show."""
        lines = [
            ["rows", f"{self.kept:,}" if self.kept == self.rows else f"{self.kept:,} of {self.rows:,}"],
            *([f"dropped: {reason}", _counted(dropped)] for reason, dropped in self.dropped.items()),
            ["tokens", f"{self.tokens:,}"],
            *self._labels(),
            *(source.line(i) for i, source in enumerate(self.sources, 1)),
            ["row length", f"median {self.median:,}, p95 {self.p95:,}, longest {self.longest:,}"],
            *self._cut(),
            ["rows with a doubled BOS", f"{self.doubled_bos:,}"],
        ]
        if self.split_conversations:
            lines.append(
                [
                    "conversations split",
                    f"{self.split_conversations:,} (earlier turns read differently in later prompts)",
                ]
            )
        if self.pad_is_eos and not self.classes:
            lines.append(["padding", "is the EOS token; EOS is trained on all the same"])
        return lines

    def _labels(self) -> list[list[str]]:
        if not self.classes:
            return [["trained on", f"{self.supervised_tokens:,} ({self.share:.1%})"]]
        counts = [f"{label} {count:,}" for label, count in self.classes.items()]
        more = f", and {len(counts) - _CLASSES} more" if len(counts) > _CLASSES else ""
        return [["labels", f"{self.supervised_tokens:,} ({', '.join(counts[:_CLASSES])}{more})"]]

    def _cut(self) -> list[list[str]]:
        if self.classes:
            return [["rows cut by max_length", f"{self.truncated_answers + self.cut_prompts:,}"]]
        return [
            ["answers cut by max_length", f"{self.truncated_answers:,}"],
            *([["prompts cut by max_length", f"{self.cut_prompts:,}"]] if self.cut_prompts else []),
            ["rows that train the end token", f"{self.eos_supervised:.1%}"],
        ]

    def warnings(self) -> Iterator[str]:
        """Yield what the user should know before training."""
        for reason, dropped in self.dropped.items():
            yield f"data: dropped ({reason}): {_counted(dropped)}"
        for i, source in enumerate(self.sources):
            if not source.rows:
                yield f"data.sources[{i}]: none of its rows is trained on; give it more rows or a higher weight"
        if self.doubled_bos:
            yield f"data: {self.doubled_bos:,} rows begin with two BOS tokens: take BOS out of your rows"
        if self.classes:
            yield from self._class_warnings()
            return
        if self.truncated_answers:
            yield f"data: {self.truncated_answers:,} rows have answers cut by data.max_length: raise it or shorten them"
        if self.cut_prompts:
            yield f"data: {self.cut_prompts:,} prompts are cut by data.max_length: raise it or shorten them"
        unended = round((1 - self.eos_supervised) * self.kept) - self.truncated_answers
        if unended > 0:
            yield f"data: {unended:,} rows do not train an end token: the model may not learn to stop"

    def _class_warnings(self) -> Iterator[str]:
        if cut := self.truncated_answers + self.cut_prompts:
            yield f"data: {cut:,} rows are cut by data.max_length: raise it or shorten them"
        if missing := [label for label, count in self.classes.items() if not count]:
            yield f"data: no row has the label {', '.join(missing[:_PLACES])}{', ...' * (len(missing) > _PLACES)}"


def refuse(found: SupervisionReport, data: DataSection) -> None:
    """Raise where too little of the data is left to train on.

    Raises:
        DataError: More than `data.max_dropped` of the rows were dropped, or all.
    """
    dropped = found.rows - found.kept
    if found.kept and dropped <= data.max_dropped * found.rows:
        return
    reasons = "; ".join(f"{reason}: {_counted(part)}" for reason, part in found.dropped.items())
    what = "no row is left to train on" if not found.kept else f"more than data.max_dropped {data.max_dropped:g}"
    hint = "fix these rows or raise data.max_dropped"
    if any("max_length" in reason for reason in found.dropped):
        hint = f"fix these rows, raise data.max_length (now {data.max_length}) or data.max_dropped"
    raise wrong("data", f"{dropped} of {found.rows} rows have nothing to train on, {what} ({reasons})", hint)


def _counted(dropped: Dropped) -> str:
    """Return e.g. `5 rows (a.jsonl:3, a.jsonl:9, a.jsonl:12, ...)`."""
    more = ", ..." if dropped.count > len(dropped.places) else ""
    return f"{dropped.count:,} row{'s' * (dropped.count != 1)} ({', '.join(dropped.places)}{more})"
