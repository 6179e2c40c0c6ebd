"""What the model is asked when its answers are generated: the same tokens that stood before the answer in training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from peftctl.data.encode import Encoder
from peftctl.data.formats import Example
from peftctl.data.problems import wrong
from peftctl.data.rendering import Rendered
from peftctl.recipe.schema import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generation_prompt(example: Example, tokenizer: PreTrainedTokenizerBase, data: DataSection) -> tuple[list[int], str]:
    """Return (tokens up to the last answer that is trained on, that answer's text).

    Raises:
        DataError: The row has no answer.
    """
    found = _prompt(example, Encoder(tokenizer, data))
    if found is None:
        raise wrong(example.where, "expected a row with an answer to generate, and this one has none")
    return found


def generation_prompts(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, data: DataSection
) -> list[tuple[list[int], str]]:
    """Return the prompt and the reference of every example that has an answer; `encode_all` drops the same rows."""
    encoder = Encoder(tokenizer, data)
    found = (_prompt(example, encoder) for example in examples)
    return [prompt for prompt in found if prompt is not None]


def _prompt(example: Example, encoder: Encoder) -> tuple[list[int], str] | None:
    if example.messages is not None:
        last = encoder.renderer.last_turn(example)
        if last is None:
            return None
        turn, answer = last
        return encoder.prompt_ids(Rendered(turn.text[: turn.start])), answer
    if example.prompt is None or not (example.completion or "").strip():
        return None
    return encoder.prompt_ids(encoder.renderer.prompt(example)), example.completion or ""
