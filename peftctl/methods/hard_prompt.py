"""Hard prompt: the frozen model answers from demonstrations in its prompt (few-shot, Brown et al. 2020, 2005.14165).

Nothing trains. k training rows, drawn by seed, become turns in front of every request, after a system message if
there is one; the result is a tokenizer whose chat template holds them, so that every tool that renders chats serves it.
With k = 0 it is the zero-shot floor that the other methods' figures start from.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from peftctl.errors import UsageError
from peftctl.methods import base
from peftctl.recipe.schema import Count, Recipe, TrainSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peftctl.data.formats import Example

_READ = {"output_dir", "seed", "report_to"}


class Config(base.MethodConfig):
    """The `method:` section of the hard prompt."""

    name: Literal["hard_prompt"] = "hard_prompt"
    shots: Count = 4
    """k: demonstrations in front of every request."""


class Method(base.Method):
    """Demonstrations in the template; no parameters."""

    Config = Config
    unread = frozenset(f"train.{key}" for key in TrainSection.model_fields if key not in _READ)
    card = base.Card(
        title="Hard prompt",
        paper="Brown et al. 2020, arXiv 2005.14165 (few-shot prompting)",
        category="baseline",
        summary="k demonstrations in the chat template of the frozen model: the floor for every other method.",
        trains="nothing",
        count="0",
        merge_note="there are no weights to merge; the result is a chat template",
        identity_at_init=False,
        identity_note="the demonstrations change the prompt",
        gates_off=frozenset({"trains", "moved"}),
    )

    def prepare_tokenizer(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], recipe: Recipe
    ) -> None:
        """Put k demonstrations into the tokenizer's chat template."""
        if recipe.data.template != "chat":
            raise UsageError(
                f"data.template: hard_prompt works on the chat template, got '{recipe.data.template}'; set it to chat"
            )
        single = [e for e in examples if e.messages and [m.role for m in e.messages][-2:] == ["user", "assistant"]]
        if len(single) < self.config.shots:
            raise UsageError(f"method.shots: asked for {self.config.shots}, but only {len(single)} rows can be shown")
        chosen = random.Random(recipe.train.seed).sample(single, self.config.shots)
        turns = [{"role": m.role, "content": m.content} for e in chosen for m in (e.messages or [])[-2:]]
        original = tokenizer.chat_template
        if not isinstance(original, str):
            raise UsageError("data.template: hard_prompt needs a tokenizer with one chat template")
        if turns:
            tokenizer.chat_template = _prepend(turns) + original

    def count(self, model: PreTrainedModel) -> int:
        """Return 0."""
        return 0

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Freeze everything."""
        return model.requires_grad_(False)

    def export(self, model: Any) -> None:
        """Return None: the tokenizer with its template is the whole result."""
        return None


def _prepend(turns: list[dict[str, str | None]]) -> str:
    """Return a line of Jinja that puts the turns before the conversation, behind a system message."""
    shown = json.dumps(turns, ensure_ascii=False)
    return (
        f"{{%- set shown = {shown} -%}}"
        "{%- if messages and messages[0]['role'] == 'system' -%}"
        "{%- set messages = messages[:1] + shown + messages[1:] -%}"
        "{%- else -%}{%- set messages = shown + messages -%}{%- endif -%}"
    )
