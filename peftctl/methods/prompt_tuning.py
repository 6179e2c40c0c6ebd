"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning, Lester et al. 2021
(https://arxiv.org/abs/2104.08691).

    the model reads  [P; E(x)],   P: (n, d) trained,   E(x): (seq, d) embeddings of the row, frozen like all else

Positions run over P and then x; nothing is predicted at P. An encoder-decoder reads P in its encoder, as in the paper.

First values are the paper's: embeddings of tokens drawn from the 5,000 first of the vocabulary (`vocab`), of a text
(`text`: the words of the task or its labels, repeated to n), or U(-0.5, 0.5) (`random`; the authors' code draws from
[0, 0.5)). peft's own draw from the whole vocabulary and from N(0, 1). The text gets none of the special tokens that a
tokenizer puts around one, so that P is what the model would read there. The paper trains with Adafactor at a constant
rate of 0.3 for 30,000 steps; its n is 100 for T5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from peftctl.methods import _prompts, base

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Config(_prompts.InitKeys):
    """The `method:` section of prompt tuning."""

    name: Literal["prompt_tuning"] = "prompt_tuning"


class Method(base.Method):
    """Trained input vectors before every row."""

    config: Config
    Config = Config
    card = base.Card(
        title="Prompt tuning",
        paper="Lester et al. 2021, arXiv 2104.08691",
        category="prompt",
        summary="n trained input vectors before every row; many tasks can share one frozen model.",
        trains="the prompt P",
        count="n * d",
        tasks=_prompts.PROMPT_TASKS,
        merge_note=_prompts.MERGE_NOTE,
        identity_at_init=False,
        identity_note=_prompts.IDENTITY_NOTE,
        supports=_prompts.SUPPORTS,
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return n * d."""
        return self.config.num_virtual_tokens * _prompts.width(model)

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Put a prompt before the model."""
        task = context.recipe.model.task
        peft_model = _prompts.prompt_tuning_model(model, self.config.num_virtual_tokens, task)
        _prompts.start_prompt(peft_model, self.config, context)
        return peft_model
