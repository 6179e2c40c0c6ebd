"""P-tuning: GPT Understands, Too, Liu et al. 2021 (https://arxiv.org/abs/2103.10385).

    the model reads  [P; E(x)],   P = encoder(H): (n, d),   H: (n, d)
    lstm    P = W2 relu(W1 BiLSTM(H) + b1) + b2,   two layers, `hidden` in either direction
    mlp     P = W3 relu(W2 relu(W1 H + b1) + b2) + b3,   W1: (hidden, d), W2: (hidden, hidden), W3: (d, hidden)

H and the encoder train, the model is frozen. After training P alone is kept: it is a plain prompt, which peft reads
without the encoder and prompt tuning can train on.

The paper puts its pseudo tokens at any place of a template, and trains the LSTM with d/2 in either direction. peft's
stand before the row, and so do these where `positions` is left out. With `positions` they stand inside of it:

    e(<|Pi|>) = P[i],   e(t) = E(t) for any other token t: E of what the embedding layer returns, scaled or not

`positions: {before_request: 3, before_answer: 3}` makes the chat template write the placeholders <|P1|>, <|P2|>, ...
there, the same ones in every turn. `positions: template` takes them from the text of `data.template`, e.g.
"<|P1|><|P2|>{text}<|P3|>", as in the paper's cloze tests. They are tokens of the tokenizer that is saved with the
artefact, whose type is ours (`tuners/prompt_slots.py`): it needs peftctl to load. An encoder-decoder reads them in its
encoder. With the adapter off a placeholder reads as an unknown token, as the authors' code embeds it at first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationInfo, field_validator

from peftctl.errors import did_you_mean
from peftctl.methods import _places, _prompts, base
from peftctl.recipe.schema import Positive, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peftctl.data.formats import Example


class Config(_prompts.PromptKeys):
    """The `method:` section of P-tuning."""

    name: Literal["p_tuning"] = "p_tuning"
    encoder: Literal["lstm", "mlp"] = "lstm"
    """What makes the prompt of its table: a bidirectional LSTM and a head (the paper's), or three linear layers."""
    hidden: Positive | None = None
    """Width of the encoder, of an LSTM in either direction; left out, d/2."""
    positions: dict[str, Positive] | Literal["template"] | None = None
    """Where the vectors stand: how many at each of front, before_request, after_request and before_answer of the chat
    template; or `template`, where `data.template` has <|P1|>, <|P2|>, ...; left out, all before the row."""

    @field_validator("positions")
    @classmethod
    def _adds_up(cls, value: Any, info: ValidationInfo) -> Any:
        n = info.data.get("num_virtual_tokens")
        for place in value if isinstance(value, dict) else ():
            if place not in _places.ORDER:
                raise ValueError(f"has no place {place}; {did_you_mean(place, _places.ORDER)}")
        if isinstance(value, dict) and n is not None and sum(value.values()) != n:
            raise ValueError(f"has {sum(value.values())} vectors, and num_virtual_tokens is {n}; make them equal")
        return value

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
        summary="n input vectors before every row or at chosen places of its template, made by an LSTM or MLP that is "
        "dropped after training.",
        trains="the encoder of the prompt and its input table",
        count="n*d, plus lstm, h = hidden: 8h(d+h) + 16h + 24h^2 + 16h + 4h^2 + 2h + 2hd + d; "
        "or mlp: 2dh + h^2 + 2h + d; n*d are kept",
        tasks=_prompts.PROMPT_TASKS,
        merge_note=_prompts.MERGE_NOTE,
        identity_at_init=False,
        identity_note=_prompts.IDENTITY_NOTE,
        supports=_prompts.SUPPORTS,
    )

    def __init__(self, config: Any):
        super().__init__(config)
        self.base_reads_rows = config.positions is None
        self.first_token: int | None = None
        self.stand_in = 0

    def prepare_tokenizer(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], recipe: Recipe
    ) -> None:
        """Add the placeholders, and write them into the chat template, where the vectors stand inside the row."""
        positions = self.config.positions
        if positions is None:
            return
        candidates = (tokenizer.unk_token_id, tokenizer.eos_token_id, 0)
        self.stand_in = next(int(token) for token in candidates if token is not None)
        places = None if positions == "template" else positions
        n = self.config.num_virtual_tokens
        self.first_token = _places.add_placeholders(tokenizer, n, places, examples, recipe)

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
        """Put an encoded prompt before the model, or into its embedding."""
        from peft import PromptEncoderConfig, get_peft_model

        keys = _prompts.peft_keys(model, self.config.num_virtual_tokens, context.recipe.model.task)
        config = PromptEncoderConfig(
            **keys,
            encoder_reparameterization_type=self.config.encoder.upper(),
            encoder_hidden_size=self._hidden(model),
        )
        return get_peft_model(model, config) if self.config.positions is None else self._inside(model, config)

    def export(self, model: Any) -> Any:
        """Return the vectors that the encoder makes, as a plain prompt, or as what placeholders read."""
        if self.config.positions is None:
            return _prompts.as_prompt_tuning(model, model.get_prompt_embedding_to_save("default"))
        from peftctl.tuners.prompt_slots import keep_vectors

        keep_vectors(model)
        return model

    def _inside(self, model: PreTrainedModel, encoder: Any) -> Any:
        """Return the model with an embedding whose placeholders read what the encoder of these settings makes."""
        from peft import get_peft_model
        from peft.tuners.p_tuning import PromptEncoder

        from peftctl.tuners.prompt_slots import PromptSlotsConfig, slots_layer

        config = PromptSlotsConfig(
            task_type=encoder.task_type,
            slots=self.config.num_virtual_tokens,
            # Shapes are looked at before there is a tokenizer: then the ids behind the vocabulary.
            first_token=model.config.get_text_config().vocab_size if self.first_token is None else self.first_token,
            stand_in=self.stand_in,
            target_modules=[_places.embedding_name(model)],
        )
        peft_model = get_peft_model(model, config)
        slots_layer(peft_model).make_by(PromptEncoder(encoder))
        return peft_model

    def _hidden(self, model: PreTrainedModel) -> int:
        return self.config.hidden or max(1, _prompts.width(model) // 2)
