"""Rendered text -> what an encoder reads and a decoder writes; and which encoder of rows a task takes.

Both texts get the special tokens that the tokenizer's own rules put around a text (T5: EOS behind each; BART: BOS and
EOS), and the target ends with EOS in any case. A chat template writes its special tokens itself. The decoder's input
is not made here: the model shifts the labels by its own rule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftctl.data.classes import TagEncoder, TextEncoder, class_encoder
from peftctl.data.encode import EncodedRow, Encoder, has_answer
from peftctl.data.formats import Example
from peftctl.data.problems import wrong
from peftctl.data.rendering import Renderer
from peftctl.recipe.schema import CLASSIFICATION, DataSection, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftctl.data.turns import Turn


def encoder_of(task: Task, tokenizer: PreTrainedTokenizerBase, data: DataSection) -> RowEncoder:
    """Return what makes rows for a task.

    Raises:
        DataError: The tokenizer does not fit the section, or the section the task.
    """
    if task in CLASSIFICATION:
        return class_encoder(task, tokenizer, data)
    return PairEncoder(tokenizer, data) if task == "seq2seq_lm" else Encoder(tokenizer, data)


class PairEncoder:
    """Encodes examples for an encoder-decoder: every answer is a row of its own, behind its own prompt.

    Raises:
        DataError: The tokenizer does not fit the section, or nothing tells prompts from answers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataSection):
        if data.format == "text" or data.loss_on == "all":
            what = "data.format: text has" if data.format == "text" else "data.loss_on: all leaves"
            raise wrong("data", f"{what} no prompt for the encoder of a seq2seq_lm", "use a format with answers")
        self.tokenizer = tokenizer
        self.max_length = data.max_length
        self.renderer = Renderer(tokenizer, data)

    def encode(self, example: Example) -> list[EncodedRow]:
        """Return the rows of one example, at least one; see `EncodedRow.dropped_reason`."""
        where = example.where
        if example.messages is None:
            if not has_answer(example):
                return [_dropped(where, "empty answer")]
            return [self._row(self._plain_ids(example.prompt or ""), self._plain_target(example), where)]
        turns, reasons = self.renderer.turns(example)
        rows = [self._row(self._turn_ids(turn), self._turn_target(turn), where) for turn in turns]
        return rows + [_dropped(where, reason) for reason in reasons]

    def question(self, example: Example) -> tuple[list[int], str] | None:
        """Return (what the encoder reads before the last answer, that answer's text); None where there is none."""
        if example.messages is not None:
            last = self.renderer.last_turn(example)
            return last and (self._shortened(self._turn_ids(last[0])), last[1])
        if not has_answer(example):
            return None
        return self._shortened(self._plain_ids(example.prompt or "")), example.completion or ""

    def _row(self, prompt: list[int], target: list[int], where: str) -> EncodedRow:
        if not prompt:
            return _dropped(where, "empty prompt")
        return EncodedRow(
            self._shortened(prompt),
            target[: self.max_length],
            where,
            truncated=len(target) > self.max_length,
            paired=True,
            prompt_cut=len(prompt) > self.max_length,
        )

    def _shortened(self, prompt: list[int]) -> list[int]:
        """Cut the end of a long prompt, but keep the special token that closes it."""
        if len(prompt) <= self.max_length:
            return prompt
        closing = prompt[-1:] if prompt[-1] in self.tokenizer.all_special_ids else []
        return prompt[: self.max_length - len(closing)] + closing

    def _plain_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def _plain_target(self, example: Example) -> list[int]:
        return self._ended(list(self.tokenizer(text_target=example.completion, verbose=False)["input_ids"]))

    def _turn_ids(self, turn: Turn) -> list[int]:
        return self._bare_ids(turn.text[: turn.start])

    def _turn_target(self, turn: Turn) -> list[int]:
        ids = self._bare_ids(turn.text[turn.start : turn.end])
        return self._ended(ids) if turn.eos else ids

    def _bare_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, int(end)]


def _dropped(where: str, reason: str) -> EncodedRow:
    return EncodedRow([], [], where, dropped_reason=reason, paired=True)


RowEncoder = Encoder | PairEncoder | TextEncoder | TagEncoder
"""What makes rows of examples."""
