"""Examples -> text with the characters that are trained on.

One conversation gives one text where every answer stands behind exactly the prompt that inference would give, and
several where the template changes earlier turns: each answer is trained on once, in the longest text that has it so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftctl.data.formats import Example
from peftctl.data.problems import wrong
from peftctl.data.turns import Chat, Turn
from peftctl.recipe.schema import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A text to be tokenised.

    Args:
        text: The text, with the special tokens that its template writes.
        spans: (first, past the last) characters that are trained on, in order.
        bos: Whether the tokenizer's BOS goes before it.
        eos: Whether EOS goes behind it, trained on.
        reason: Why there is nothing to train on, or None.
    """

    text: str
    spans: tuple[Span, ...] = ()
    bos: bool = False
    eos: bool = False
    reason: str | None = None


class Renderer:
    """Renders examples for one tokenizer and one `data:` section.

    Raises:
        DataError: `template: chat` and a tokenizer without one, or a format that has no text to train on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataSection):
        self.tokenizer = tokenizer
        self.loss_on = data.loss_on
        if data.format in ("labelled_text", "tokens_tags"):
            raise wrong("data.format", f"{data.format} trains a classifier, not text", "use a format with answers")
        self.chat = Chat(tokenizer)
        if not tokenizer.chat_template and data.format != "text" and data.template == "chat":
            raise wrong(
                "data.template",
                "chat needs a tokenizer with a chat template, and this model's has none",
                'use an instruction-tuned model, or format prompt_completion or alpaca with template "{prompt}\\n"'
                if data.format in ("messages", "sharegpt")
                else 'set it to alpaca or to a "{...}" string',
            )
        self._writes_bos = tokenizer.bos_token_id is not None and (
            tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        )

    def render(self, example: Example) -> list[Rendered]:
        """Return the texts of one example, at least one.

        Raises:
            DataError: The chat template refuses the conversation.
        """
        if example.messages is not None:
            return self._conversation(example)
        if example.prompt is None:
            return [self._plain("", example.text or "", "empty text")]
        return [self._plain(example.prompt, example.completion or "", "empty answer")]

    def last_turn(self, example: Example) -> tuple[Turn, str] | None:
        """Return the last answer of a conversation that is trained on, with its text; None where there is none."""
        messages = example.messages or []
        indices = [i for i in self._trainable(example) if not messages[i].is_blank]
        if not indices:
            return None
        turn = self.chat.turn(messages, indices[-1], example.tools, example.where)
        return turn, messages[indices[-1]].content or turn.text[turn.start : turn.end]

    def prompt(self, example: Example) -> Rendered:
        """Return the text of a plain example before its answer."""
        return self._plain(example.prompt or "", "", None)

    def _plain(self, prompt: str, answer: str, reason_if_blank: str | None) -> Rendered:
        text = prompt + answer
        bos = self._writes_bos and not text.startswith(str(self.tokenizer.bos_token))
        if not answer.strip():
            return Rendered(text, bos=bos, reason=reason_if_blank)
        start = 0 if self.loss_on == "all" else len(prompt)
        eos = self.tokenizer.eos_token_id is not None and not text.endswith(str(self.tokenizer.eos_token))
        return Rendered(text, ((start, len(text)),), bos, eos)

    def _trainable(self, example: Example) -> list[int]:
        """Return the assistant messages that `train` flags and `loss_on` leave."""
        messages = example.messages or []
        indices = [i for i, m in enumerate(messages) if m.role == "assistant" and m.train is not False]
        return indices[-1:] if self.loss_on == "last_turn" else indices

    def turns(self, example: Example) -> tuple[list[Turn], list[str]]:
        """Return the answers of a conversation that are trained on, and for each that can't be the reason."""
        messages = example.messages or []
        indices = self._trainable(example)
        if not indices:
            answers = any(message.role == "assistant" for message in messages)
            return [], ["every assistant turn has train: false" if answers else "no assistant turn"]
        blank = [i for i in indices if messages[i].is_blank]
        turns = [self.chat.turn(messages, i, example.tools, example.where) for i in indices if i not in blank]
        return turns, ["empty answer"] * len(blank)

    def _conversation(self, example: Example) -> list[Rendered]:
        if self.loss_on == "all":
            return [self._whole(example)]
        turns, reasons = self.turns(example)
        return _merged(turns) + [Rendered("", reason=reason) for reason in reasons]

    def _whole(self, example: Example) -> Rendered:
        messages = example.messages or []
        if any(message.train is False for message in messages):
            raise wrong(example.where, "train: false has no effect with data.loss_on: all", "use loss_on: completion")
        text = self.chat.render(messages, example.tools, example.where)
        eos = self.tokenizer.eos_token_id is not None and not self.chat.ends_with_token(text)
        return Rendered(text, ((0, len(text)),), eos=eos)


def _merged(turns: Sequence[Turn]) -> list[Rendered]:
    """Put every turn into the longest text that begins with it, prompt, answer and end; the order is kept."""
    rows: list[tuple[Turn, list[Span]]] = []
    for turn in reversed(turns):
        up_to_end = turn.text[: turn.end]
        home = None if turn.eos else next((row for row in rows if row[0].text.startswith(up_to_end)), None)
        if home is None:
            home = (turn, [])
            rows.append(home)
        home[1].append((turn.start, turn.end))
    return [Rendered(turn.text, tuple(sorted(spans)), eos=turn.eos) for turn, spans in reversed(rows)]
