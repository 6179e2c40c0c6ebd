"""What of a data set is trained on, known before the first step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftctl.data.encode import IGNORED, EncodedRow
from peftctl.data.problems import wrong
from peftctl.recipe.schema import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACES = 3


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
class SupervisionReport:
    """Figures of a data set after encoding; lengths and tokens count kept rows only.

    Args:
        rows: Rows after encoding; a conversation can give several.
        kept: Rows with a token to train on.
        dropped: Reason -> the others.
        tokens: Tokens of all rows, without padding.
        supervised_tokens: Tokens that are predicted and trained on.
        share: supervised_tokens / tokens.
        truncated_answers: Rows whose answers `max_length` cut.
        eos_supervised: Share of rows whose last trained token is EOS or an end-of-turn token.
        doubled_bos: Rows that begin with two BOS tokens.
        pad_is_eos: Whether padding is the EOS token; harmless here, as labels never follow from padding.
        split_conversations: Conversations of several rows, because earlier turns read differently in later prompts.
        longest: Tokens of the longest row.
        median: Median of the tokens of a row.
        p95: 95th percentile of the tokens of a row.
    """

    rows: int
    kept: int
    dropped: dict[str, Dropped]
    tokens: int
    supervised_tokens: int
    share: float
    truncated_answers: int
    eos_supervised: float
    doubled_bos: int
    pad_is_eos: bool
    split_conversations: int
    longest: int
    median: int
    p95: int

    def lines(self) -> list[list[str]]:
        """Return (name, value) pairs to show."""
        lines = [
            ["rows", f"{self.kept:,}" if self.kept == self.rows else f"{self.kept:,} of {self.rows:,}"],
            *([f"dropped: {reason}", _counted(dropped)] for reason, dropped in self.dropped.items()),
            ["tokens", f"{self.tokens:,}"],
            ["trained on", f"{self.supervised_tokens:,} ({self.share:.1%})"],
            ["row length", f"median {self.median:,}, p95 {self.p95:,}, longest {self.longest:,}"],
            ["answers cut by max_length", f"{self.truncated_answers:,}"],
            ["rows that train the end token", f"{self.eos_supervised:.1%}"],
            ["rows with a doubled BOS", f"{self.doubled_bos:,}"],
        ]
        if self.split_conversations:
            lines.append(
                [
                    "conversations split",
                    f"{self.split_conversations:,} (earlier turns read differently in later prompts)",
                ]
            )
        if self.pad_is_eos:
            lines.append(["padding", "is the EOS token; EOS is trained on all the same"])
        return lines

    def warnings(self) -> Iterator[str]:
        """Yield what the user should know before training."""
        for reason, dropped in self.dropped.items():
            yield f"data: dropped ({reason}): {_counted(dropped)}"
        if self.truncated_answers:
            yield f"data: {self.truncated_answers:,} rows have answers cut by data.max_length: raise it or shorten them"
        if self.doubled_bos:
            yield f"data: {self.doubled_bos:,} rows begin with two BOS tokens: take BOS out of your rows"
        unended = round((1 - self.eos_supervised) * self.kept) - self.truncated_answers
        if unended > 0:
            yield f"data: {unended:,} rows do not train an end token: the model may not learn to stop"


def report(
    groups: Sequence[Sequence[EncodedRow]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[EncodedRow], SupervisionReport]:
    """Return the rows to train on and the figures of all rows.

    Args:
        groups: The rows of each example.
        tokenizer: That encoded them.
    """
    rows = [row for group in groups for row in group]
    kept = [row for row in rows if row.dropped_reason is None]
    lengths = sorted(len(row.input_ids) for row in kept) or [0]
    tokens = sum(lengths)
    supervised = sum(label != IGNORED for row in kept for label in row.labels[1:])
    ends = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {tokenizer.eos_token_id}
    ended = sum(_last_supervised(row) in ends for row in kept)
    bos = tokenizer.bos_token_id
    return kept, SupervisionReport(
        rows=len(rows),
        kept=len(kept),
        dropped=_dropped(rows),
        tokens=tokens,
        supervised_tokens=supervised,
        share=supervised / tokens if tokens else 0.0,
        truncated_answers=sum(row.truncated for row in kept),
        eos_supervised=ended / len(kept) if kept else 0.0,
        doubled_bos=sum(bos is not None and row.input_ids[:2] == [bos, bos] for row in kept),
        pad_is_eos=tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id,
        split_conversations=sum(sum(row.dropped_reason is None for row in group) > 1 for group in groups),
        longest=lengths[-1],
        median=lengths[len(lengths) // 2],
        p95=lengths[min(len(lengths) - 1, int(len(lengths) * 0.95))],
    )


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


def _dropped(rows: Sequence[EncodedRow]) -> dict[str, Dropped]:
    places: dict[str, list[str]] = {}
    for row in rows:
        if row.dropped_reason:
            places.setdefault(row.dropped_reason, []).append(row.where)
    return {reason: Dropped(len(found), tuple(found[:_PLACES])) for reason, found in places.items()}


def _counted(dropped: Dropped) -> str:
    """Return e.g. `5 rows (a.jsonl:3, a.jsonl:9, a.jsonl:12, ...)`."""
    more = ", ..." if dropped.count > len(dropped.places) else ""
    return f"{dropped.count:,} row{'s' * (dropped.count != 1)} ({', '.join(dropped.places)}{more})"


def _last_supervised(row: EncodedRow) -> int | None:
    return next((label for label in reversed(row.labels) if label != IGNORED), None)
