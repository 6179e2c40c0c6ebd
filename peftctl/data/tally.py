"""Counts what of a data set is trained on, row by row, so that parts of it can be counted apart."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peftctl.data.encode import IGNORED, EncodedRow
from peftctl.data.supervision import Dropped, SourceReport, SupervisionReport
from peftctl.recipe.schema import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACES = 3


@dataclass(frozen=True)
class Marks:
    """Tokens that rows begin and end with.

    Args:
        ends: EOS and the special tokens that end a turn.
        bos: The token that a text begins with, if any.
    """

    ends: frozenset[int | None]
    bos: int | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Marks:
        """Return those of a tokenizer."""
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        return cls(frozenset({*special, tokenizer.eos_token_id}), tokenizer.bos_token_id)


@dataclass
class _Sum:
    rows: int = 0
    tokens: int = 0
    supervised: int = 0

    def add(self, other: _Sum) -> None:
        self.rows += other.rows
        self.tokens += other.tokens
        self.supervised += other.supervised


@dataclass
class Tally:
    """What `SupervisionReport` is made of; the rows that it counts are forgotten.

    Args:
        rows: All, also those that are dropped.
        counts: Of kept rows, by their fact: cut, prompt cut, ended, doubled BOS; of conversations: split.
        lengths: Tokens of each kept row.
        dropped: Reason -> how many rows.
        places: Reason -> where the first of them are.
        sums: Of kept rows by source.
        classes: Class -> how many labels; None where labels are tokens.
    """

    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    lengths: array[int] = field(default_factory=lambda: array("Q"))
    dropped: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    sums: dict[int | None, _Sum] = field(default_factory=dict)
    classes: Counter[int] | None = None

    def count(self, group: Sequence[EncodedRow], origin: int | None, marks: Marks, times: int = 1) -> None:
        """Add the rows of an example.

        Args:
            group: Its rows.
            origin: Its source.
            marks: Of the tokenizer.
            times: How often an epoch has it.
        """
        self.rows += times * len(group)
        self.counts["split"] += times * (sum(map(_is_sequence, group)) > 1)
        for row in group:
            if row.dropped_reason is not None:
                self._drop(row.dropped_reason, [row.where], times)
                continue
            self.lengths.extend([row.tokens] * times)
            own = _Sum(times, times * row.tokens, times * row.supervised)
            self.sums.setdefault(origin, _Sum()).add(own)
            self.counts["cut"] += times * row.truncated
            self.counts["prompt cut"] += times * row.prompt_cut
            self.counts["ended"] += times * (_last_supervised(row) in marks.ends)
            self.counts["doubled bos"] += times * (marks.bos is not None and row.input_ids[:2] == [marks.bos] * 2)
            if row.classes:
                self.classes = Counter() if self.classes is None else self.classes
                self.classes.update({label: times * n for label, n in Counter(row.labels).items()})

    def add(self, later: Tally) -> None:
        """Add what was counted of the rows that come next."""
        self.rows += later.rows
        self.counts.update(later.counts)
        self.lengths.extend(later.lengths)
        for reason, count in later.dropped.items():
            self._drop(reason, later.places[reason], count)
        for origin, own in later.sums.items():
            self.sums.setdefault(origin, _Sum()).add(own)
        if later.classes is not None:
            self.classes = (self.classes or Counter()) + later.classes

    def _drop(self, reason: str, places: Sequence[str], count: int) -> None:
        self.dropped[reason] += count
        known = self.places.setdefault(reason, [])
        known += places[: _PLACES - len(known)]

    def report(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sources: Sequence[Source] | None = None,
        labels: Sequence[str | int] = (),
    ) -> SupervisionReport:
        """Return the figures.

        Args:
            tokenizer: That encoded the rows.
            sources: `data.sources`.
            labels: `data.labels`, of a classifier.
        """
        lengths, kept = sorted(self.lengths) or [0], len(self.lengths)
        tokens, supervised = sum(lengths), sum(own.supervised for own in self.sums.values())
        return SupervisionReport(
            rows=self.rows,
            kept=kept,
            dropped={reason: Dropped(n, tuple(self.places[reason])) for reason, n in self.dropped.items()},
            tokens=tokens,
            supervised_tokens=supervised,
            share=supervised / tokens if tokens else 0.0,
            truncated_answers=self.counts["cut"],
            cut_prompts=self.counts["prompt cut"],
            eos_supervised=self.counts["ended"] / kept if kept else 0.0,
            doubled_bos=self.counts["doubled bos"],
            pad_is_eos=tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id,
            split_conversations=self.counts["split"],
            longest=lengths[-1],
            median=lengths[len(lengths) // 2],
            p95=lengths[min(len(lengths) - 1, int(len(lengths) * 0.95))],
            sources=self._by_source(sources or (), tokens),
            classes={} if self.classes is None else {str(label): self.classes[i] for i, label in enumerate(labels)},
        )

    def _by_source(self, sources: Sequence[Source], all_tokens: int) -> tuple[SourceReport, ...]:
        if not any(origin is not None for origin in self.sums):  # rows of `data.eval` come from no source
            return ()
        return tuple(
            SourceReport(
                path=source.path,
                weight=source.weight,
                rows=own.rows,
                tokens=own.tokens,
                share=own.tokens / all_tokens if all_tokens else 0.0,
                supervised_tokens=own.supervised,
                supervised_share=own.supervised / own.tokens if own.tokens else 0.0,
            )
            for source, own in ((source, self.sums.get(i, _Sum())) for i, source in enumerate(sources))
        )


def _is_sequence(row: EncodedRow) -> bool:
    return row.dropped_reason is None and not row.paired and not row.classes


def _last_supervised(row: EncodedRow) -> int | None:
    return next((label for label in reversed(row.labels) if label != IGNORED), None)
