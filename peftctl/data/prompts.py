"""What the model is asked when its answers are generated: the same tokens that stood before the answer in training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from peftctl.data.formats import Example, section_of
from peftctl.data.pairs import encoder_of
from peftctl.data.problems import wrong
from peftctl.recipe.schema import DataSection, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generation_prompt(
    example: Example, tokenizer: PreTrainedTokenizerBase, data: DataSection, task: Task = "causal_lm"
) -> tuple[list[int], str]:
    """Return (tokens up to the last answer that is trained on, that answer's text).

    Raises:
        DataError: The row has no answer.
    """
    found = encoder_of(task, tokenizer, section_of(data, example.source)).question(example)
    if found is None:
        raise wrong(example.where, "expected a row with an answer to generate, and this one has none")
    return found


def generation_prompts(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, data: DataSection, task: Task = "causal_lm"
) -> list[tuple[list[int], str]]:
    """Return the prompt and the reference of every example that has an answer; `encode_all` drops the same rows."""
    rows = list(examples)
    encoders = {i: encoder_of(task, tokenizer, section_of(data, i)) for i in {example.source for example in rows}}
    found = (encoders[example.source].question(example) for example in rows)
    return [prompt for prompt in found if prompt is not None]
