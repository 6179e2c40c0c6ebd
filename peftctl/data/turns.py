"""Where an answer begins and ends in what a chat template writes, found by rendering alone.

Any template works, with or without `{% generation %}` marks. For the assistant turn i let prompt = render(messages
before i, with the generation prompt) and full = render(messages up to and with i). The answer begins where the prompt
ends. What follows its content is the end that full shares with the same turn under two other contents; the first
special token in there ends the turn, and what the template writes after that (a newline, a second token) is not ours.

- full does not begin with the prompt because the *generation prompt* differs (one that opens `<think>`): the answer
  begins where the two part, white space aside.
- ... because *earlier text* differs (a system message written only when the user spoke last): the text becomes the
  prompt that inference would give, followed by what full has after the end of that prompt.
- The template knows no generation prompt: the header that it writes around any content is not part of the answer.
- No special token follows the content: the text ends with the content and the tokenizer's EOS is appended. Such a
  turn is never the beginning of a longer row, or the model would learn from the next header not to stop.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from peftctl.data.conversations import Message
from peftctl.data.problems import wrong

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# They differ in their first and last characters, so that what their renderings share is the template's alone.
_PROBES = ("b7f", "q3x")
# The most that a template is taken to write between a prompt and the content after it, and how much of the end of a
# prompt must be looked at to recognise it.
_HEADER, _RECOGNISED = 400, 2000


@dataclass(frozen=True)
class Turn:
    """One answer behind the prompt that inference would give.

    Args:
        text: The conversation up to this answer, and what the template writes after it.
        start: Character of `text` at which the answer begins.
        end: Character after its end-of-turn token.
        eos: Whether the template ends the turn with no token, so that EOS must follow `text`.
    """

    text: str
    start: int
    end: int
    eos: bool


class Chat:
    """Renders conversations with the tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._special = _any_of(special)
        self._added = _any_of({str(token) for token in added} | special)

    def render(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, where: str, *, generation: bool = False
    ) -> str:
        """Return the text of a conversation.

        Raises:
            DataError: The template refuses it; the message is the template's own.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                [message.for_template() for message in messages],
                tools=tools,  # type: ignore[arg-type]
                add_generation_prompt=generation,
                tokenize=False,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            message = (str(error).splitlines() or [type(error).__name__])[0]
            raise wrong(where, f"the tokenizer's chat template refuses this conversation: {message}") from error
        return str(text)

    def turn(self, messages: Sequence[Message], i: int, tools: list[dict[str, Any]] | None, where: str) -> Turn:
        """Find the answer of assistant message `i` of a conversation."""
        answer, before = messages[i], messages[:i]
        full = self.render([*before, answer], tools, where)
        extra = {key: value for key, value in answer.extra.items() if key != "tool_calls"}
        probes = [self.render([*before, Message(answer.role, probe, extra=extra)], tools, where) for probe in _PROBES]
        if probes[0] == probes[1]:
            raise wrong(where, "the tokenizer's chat template leaves out the text of assistant messages")
        head = _shared_start([full, *probes])
        if before:
            full, start = self._from_prompt(full, head, before, tools, where)
        else:
            start = head
        tail = _shared_end([full[start:], *probes])
        if any(call["function"]["name"] not in full[start:] for call in answer.extra.get("tool_calls", ())):
            raise wrong(where, "the tokenizer's chat template leaves out the tool calls of assistant messages")
        end = self._end_of_turn(full, start, len(full) - tail, answer)
        if end is not None:
            return Turn(full, start, end, eos=False)
        content_end = len(full) - tail
        return Turn(full[:content_end], start, content_end, eos=self.tokenizer.eos_token_id is not None)

    def ends_with_token(self, text: str) -> bool:
        """Whether the last thing in the text, but for white space, is a special token."""
        text = text.rstrip()
        return any(match.end() == len(text) for match in self._special.finditer(text))

    def _from_prompt(
        self, full: str, head: int, before: Sequence[Message], tools: list[dict[str, Any]] | None, where: str
    ) -> tuple[str, int]:
        """Return the text that begins with the prompt of inference, and where its answer begins.

        Args:
            full: Rendering with the answer.
            head: Length of what the template writes before any content there.
            before: Messages before the answer.
            tools: Tools of the conversation.
            where: Place of the row.
        """
        prompt = self.render(before, tools, where, generation=True)
        if full.startswith(prompt) and not full[len(prompt) : head].strip():
            return full, len(prompt)
        bare = self.render(before, tools, where)
        if not full.startswith(prompt):
            unchanged = _shared_start([prompt, bare])
            if full.startswith(prompt[:unchanged]):
                return full, self._behind_token(full, _end_of_header(prompt, full[:head]))
            found = _end_of_prompt(prompt, full[:head])
            full, head = prompt + full[found:], len(prompt) + head - found
        has_header = prompt == bare and bool(full[len(prompt) : head].strip())
        return full, head if has_header else len(prompt)

    def _behind_token(self, text: str, position: int) -> int:
        """Return the position, or the end of the added token that it would cut in two."""
        for match in self._added.finditer(text, max(0, position - 100)):
            if match.start() < position < match.end():
                return match.end()
        return position

    def _end_of_turn(self, full: str, start: int, content_end: int, answer: Message) -> int | None:
        """Return the end of the token that ends the turn; None where there is no such token."""
        found = self._special.search(full, content_end) or self._added.search(full, content_end)
        if found is None and answer.calls_tools:
            # Calls may end with a token of their own, which the probes, plain answers, do not show.
            found = max(self._special.finditer(full, start), key=lambda match: match.end(), default=None)
        return found.end() if found else None


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of any of these texts, the longer ones first; of none, it matches nothing."""
    ordered = sorted((token for token in tokens if token), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or "(?!)")


def _end_of_prompt(prompt: str, head: str) -> int:
    """Return the position in `head` at which the text ends that looks most like the end of `prompt`."""
    best, position = 0, len(head)
    for end in range(len(head), max(0, len(head) - _HEADER) - 1, -1):
        length = _shared_end([prompt[-_RECOGNISED:], head[max(0, end - _RECOGNISED) : end]])
        if length > best:
            best, position = length, end
    return position


def _end_of_header(prompt: str, head: str) -> int:
    """Return the position in `head` up to which it agrees with `prompt`, but for white space."""
    end = _shared_start([prompt, head])
    rest = prompt[end:]
    while True:
        rest, header = rest.lstrip(), head[end:].lstrip()
        shared = _shared_start([rest, header])
        if not shared:
            return end
        rest, end = rest[shared:], len(head) - len(header) + shared


def _shared_start(texts: Sequence[str]) -> int:
    """Return how many characters all texts share at their beginning."""
    low, high = 0, min(map(len, texts))
    while low < high:
        middle = (low + high + 1) // 2
        if all(text.startswith(texts[0][:middle]) for text in texts):
            low = middle
        else:
            high = middle - 1
    return low


def _shared_end(texts: Sequence[str]) -> int:
    """Return how many characters all texts share at their end."""
    low, high = 0, min(map(len, texts))
    while low < high:
        middle = (low + high + 1) // 2
        if all(text.endswith(texts[0][-middle:]) for text in texts):
            low = middle
        else:
            high = middle - 1
    return low
