"""Rendered text -> token ids and labels, such that the ids before an answer are those that generation starts from.

A text is tokenised once, as a whole. Where a prompt ends inside a token of the whole (or the tokenizer gives no
offsets), the text is cut there and its pieces are tokenised one by one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from peftctl.data.formats import Example
from peftctl.data.rendering import Rendered, Renderer
from peftctl.recipe.schema import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is not trained on."""

# Put before a piece from the middle of a text, for tokenizers that mark where a text begins.
_ANCHORS = ("\n", ".")


@dataclass(frozen=True)
class EncodedRow:
    """One row of a training set: a sequence for a causal model, a pair of sequences, or a sequence with classes.

    Args:
        input_ids: Tokens, at most `data.max_length`; of a pair, what the encoder reads.
        labels: Of a sequence as many: the token itself where it is trained on, else -100. Of a pair what the decoder
            writes, at most `data.max_length`. Not shifted. Of a text with a class that class alone; of words with
            classes one at the first piece of each word, else -100.
        where: Place of the row it came from.
        truncated: Whether `max_length` cut off tokens that were to be trained on.
        dropped_reason: Why nothing in it can be trained on; None for a good row.
        paired: Whether it is a pair: for an encoder-decoder.
        prompt_cut: Whether `max_length` cut what the encoder reads.
        classes: Whether its labels are classes, not tokens.
        source: Which of `data.sources` it came from, counted from 0; None where there are none.
        wrong: Rows with wrong answers in the place of the right one.
    """

    input_ids: list[int]
    labels: list[int]
    where: str
    truncated: bool = False
    dropped_reason: str | None = None
    paired: bool = False
    prompt_cut: bool = False
    classes: bool = False
    source: int | None = None
    wrong: tuple[EncodedRow, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of all sequences of the row."""
        return len(self.input_ids) + (len(self.labels) if self.paired else 0)

    @property
    def supervised(self) -> int:
        """Tokens or classes that are predicted and trained on; nothing predicts the first token of a sequence."""
        every = self.paired or self.classes
        return sum(label != IGNORED for label in (self.labels if every else self.labels[1:]))


class Encoder:
    """Encodes examples for one tokenizer and one `data:` section.

    Raises:
        DataError: The tokenizer does not fit the section.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataSection):
        self.tokenizer = tokenizer
        self.max_length = data.max_length
        self.renderer = Renderer(tokenizer, data)

    def encode(self, example: Example) -> list[EncodedRow]:
        """Return the rows of one example, at least one; see `EncodedRow.dropped_reason`."""
        return [
            self._row(part, example.where)
            for rendered in self.renderer.render(example)
            for part in self._separated(rendered)
        ]

    def question(self, example: Example) -> tuple[list[int], str] | None:
        """Return (tokens up to the last answer that is trained on, that answer's text); None where there is none."""
        if example.messages is not None:
            last = self.renderer.last_turn(example)
            if last is None:
                return None
            turn, answer = last
            return self._prompt_ids(Rendered(turn.text[: turn.start])), answer
        if not has_answer(example):
            return None
        return self._prompt_ids(self.renderer.prompt(example)), example.completion or ""

    def _prompt_ids(self, prompt: Rendered) -> list[int]:
        bos = [self.tokenizer.bos_token_id] if prompt.bos else []
        return [*bos, *self._tokens(prompt.text)[0]]

    def _row(self, rendered: Rendered, where: str) -> EncodedRow:
        if rendered.reason:
            return EncodedRow([], [], where, dropped_reason=rendered.reason)
        ids, labels = self._labelled(rendered)
        kept = labels[: self.max_length]
        # The first token has nothing before it to be predicted from.
        supervised = sum(label != IGNORED for label in kept[1:])
        lost = any(label != IGNORED for label in labels[self.max_length :])
        reason = None
        if not supervised:
            reason = "prompt longer than max_length" if lost else "nothing to predict"
        return EncodedRow(ids[: self.max_length], kept, where, truncated=lost, dropped_reason=reason)

    def _labelled(self, rendered: Rendered) -> tuple[list[int], list[int]]:
        ids, starts = self._tokenise(rendered.text, rendered.spans)
        labels = [IGNORED] * len(ids)
        for start, end in rendered.spans:
            first, last = bisect_left(starts, start), bisect_left(starts, end)
            labels[first:last] = ids[first:last]
        if rendered.bos:
            ids, labels = [int(self.tokenizer.bos_token_id), *ids], [IGNORED, *labels]
        if rendered.eos:
            ids, labels = [*ids, int(self.tokenizer.eos_token_id)], [*labels, int(self.tokenizer.eos_token_id)]
        return ids, labels

    def _separated(self, rendered: Rendered) -> list[Rendered]:
        """Give each answer that begins inside a token a row of its own, if there are others.

        The cut before it is right for this answer alone: the prompts of later ones hold the text uncut.
        """
        if len(rendered.spans) < 2 or not self.tokenizer.is_fast:
            return [rendered]
        _, starts, ends = self._tokens(rendered.text)
        inside = [span for span in rendered.spans if span[0] and not _between_tokens(span[0], starts, ends)]
        together = tuple(span for span in rendered.spans if span not in inside)
        return [_only(rendered, spans) for spans in [*((span,) for span in inside), together] if spans]

    def _tokenise(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Return the tokens and the character at which each starts."""
        if not self.tokenizer.is_fast:
            return self._in_pieces(text, sorted({position for span in spans for position in span}))
        ids, starts, ends = self._tokens(text)
        cuts = [start for start, _ in spans if start and not _between_tokens(start, starts, ends)]
        return self._in_pieces(text, cuts) if cuts else (ids, starts)

    def _in_pieces(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        starts: list[int] = []
        bounds = [0, *(cut for cut in cuts if 0 < cut < len(text)), len(text)]
        for first, last in pairwise(bounds):
            piece_ids, piece_starts = self._continued(text[first:last], is_first=first == 0)
            ids.extend(piece_ids)
            starts.extend(first + start for start in piece_starts)
        return ids, starts

    def _continued(self, piece: str, *, is_first: bool) -> tuple[list[int], list[int]]:
        """Return the tokens of a piece, and where they start in it, as they follow other text."""
        for anchor in () if is_first else _ANCHORS:
            before = self._tokens(anchor)[0]
            ids, starts, _ = self._tokens(anchor + piece)
            if ids[: len(before)] == before:
                return ids[len(before) :], [max(0, start - len(anchor)) for start in starts[len(before) :]]
        ids, starts, _ = self._tokens(piece)
        return ids, starts

    def _tokens(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Return ids and the characters where each token starts and ends, zeros for a tokenizer without offsets."""
        fast = self.tokenizer.is_fast
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        ids = list(encoded["input_ids"])
        if not fast or not ids:
            return ids, [0] * len(ids), [0] * len(ids)
        starts, ends = map(list, zip(*encoded["offset_mapping"], strict=True))
        # Some tokenizers leave the space that a token begins with out of its offsets; it is the token's all the same.
        starts = [0, *map(min, starts[1:], ends)]
        return ids, starts, ends


def has_answer(example: Example) -> bool:
    """Whether a plain example has an answer to generate or to train on."""
    return example.prompt is not None and bool((example.completion or "").strip())


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, data: DataSection) -> list[EncodedRow]:
    """Return the rows of one example; for many, `dataset.encode_all` prepares the tokenizer once."""
    return Encoder(tokenizer, data).encode(example)


def _only(rendered: Rendered, spans: tuple[tuple[int, int], ...]) -> Rendered:
    """Return the text with only these spans trained on, up to the last of them."""
    if spans[-1] == rendered.spans[-1]:
        return replace(rendered, spans=spans)
    return Rendered(rendered.text[: spans[-1][1]], spans)


def _between_tokens(position: int, starts: Sequence[int], ends: Sequence[int]) -> bool:
    """Whether a token ends at `position`."""
    index = bisect_left(starts, position)
    return index > 0 and ends[index - 1] == position
