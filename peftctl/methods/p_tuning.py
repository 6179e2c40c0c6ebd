"""P-tuning: GPT Understands, Too, Liu et al. 2021 (https://arxiv.org/abs/2103.10385).

    the model reads  [P; E(x)],   P = encoder(H): (n, d),   H: (n, d)
    lstm    P = W2 relu(W1 BiLSTM(H) + b1) + b2,   two layers, `hidden` in either direction
    mlp     P = W3 relu(W2 relu(W1 H + b1) + b2) + b3,   W1: (hidden, d), W2: (hidden, hidden), W3: (d, hidden)

H and the encoder train, the model is frozen. After training P alone is kept: it is a plain prompt, which peft reads
without the encoder and prompt tuning can train on.

The paper puts its pseudo tokens at any place of a template, and trains the LSTM with d/2 in either direction. Here, as
in peft, all n stand before the row; other places are not offered yet. An encoder-decoder reads them in its encoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from peftctl.methods import _prompts, base
from peftctl.recipe.schema import Positive

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Config(_prompts.PromptKeys):
    """The `method:` section of P-tuning."""

    name: Literal["p_tuning"] = "p_tuning"
    encoder: Literal["lstm", "mlp"] = "lstm"
    """What makes the prompt of its table: a bidirectional LSTM and a head (the paper's), or three linear layers."""
    hidden: Positive | None = None
    """Width of the encoder, of an LSTM in either direction; left out, d/2."""

    @field_validator("init_from")
    @classmethod
    def _starts_anew(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError("a finished prompt has no encoder; go on from it with method.name: prompt_tuning")
        return value


class Method(base.Method):
    """A prompt made by a small network that is dropped after training."""

    config: Config
    Config = Config
    card = base.Card(
        title="P-tuning",
        paper="Liu et al. 2021, arXiv 2103.10385",
        category="prompt",
        summary="n input vectors before every row, made by an LSTM or MLP that is dropped after training; vectors at "
        "other places of a template are not offered yet.",
        trains="the encoder of the prompt and its input table",
        count="n*d, plus lstm, h = hidden: 8h(d+h) + 16h + 24h^2 + 16h + 4h^2 + 2h + 2hd + d; "
        "or mlp: 2dh + h^2 + 2h + d; n*d are kept",
        tasks=_prompts.PROMPT_TASKS,
        merge_note=_prompts.MERGE_NOTE,
        identity_at_init=False,
        identity_note=_prompts.IDENTITY_NOTE,
        supports=_prompts.SUPPORTS,
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the parameters of the table and the encoder."""
        d, h = _prompts.width(model), self._hidden(model)
        table = self.config.num_virtual_tokens * d
        if self.config.encoder == "mlp":
            return table + 2 * d * h + h * h + 2 * h + d
        # Four gates, two directions, two biases a gate; the second layer reads both directions of the first.
        first, second = 2 * (4 * h * (d + h) + 8 * h), 2 * (4 * h * 3 * h + 8 * h)
        head = (2 * h) ** 2 + 2 * h + 2 * h * d + d
        return table + first + second + head

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Put an encoded prompt before the model."""
        from peft import PromptEncoderConfig, get_peft_model

        keys = _prompts.peft_keys(model, self.config.num_virtual_tokens, context.recipe.model.task)
        config = PromptEncoderConfig(
            **keys,
            encoder_reparameterization_type=self.config.encoder.upper(),
            encoder_hidden_size=self._hidden(model),
        )
        return get_peft_model(model, config)

    def export(self, model: Any) -> Any:
        """Return the vectors that the encoder makes, as a plain prompt."""
        return _prompts.as_prompt_tuning(model, model.get_prompt_embedding_to_save("default"))

    def _hidden(self, model: PreTrainedModel) -> int:
        return self.config.hidden or max(1, _prompts.width(model) // 2)
