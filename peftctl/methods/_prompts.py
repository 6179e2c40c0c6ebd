"""What methods with trained input vectors share: keys, first values, how peft carries them, and the plain result.

n vectors of the width of the input embedding stand before every row: [P; E(x)], P: (n, d). Of an encoder-decoder only
the encoder reads them. The result is always peft's PROMPT_TUNING, whatever made the vectors.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from peftctl.errors import UsageError
from peftctl.methods import base
from peftctl.methods._lora import TASK_TYPES
from peftctl.recipe.schema import Positive

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

COMMON_TOKENS = 5000
"""Vocabulary entries that `init: vocab` draws from: the first ones are the most common (Lester et al., section 3)."""
UNIFORM = 0.5
"""`init: random` draws from U(-UNIFORM, UNIFORM)."""
IDENTITY_NOTE = "a prompt takes part in every attention, so none of its values leaves the base's answers as they were"
MERGE_NOTE = "a prompt is input, not weights: load it with the base as an adapter"
PROMPT_TASKS = ("causal_lm", "seq2seq_lm")
SUPPORTS: frozenset[base.Feature] = frozenset({"4bit", "8bit", "gradient_checkpointing", "resume"})


class PromptKeys(base.AdapterConfig):
    """Keys that every prompt has."""

    num_virtual_tokens: Positive = 20
    """n: how many trained vectors stand before every row. They take positions of the model like tokens."""


class InitKeys(PromptKeys):
    """Keys of prompts whose vectors train themselves."""

    init: Literal["vocab", "text", "random"] = "vocab"
    """First values: embeddings of tokens drawn from the 5,000 first of the vocabulary; embeddings of `init_text`; or
    uniform between -0.5 and 0.5."""
    init_text: str | None = Field(default=None, validate_default=True)
    """Text of `init: text`, e.g. what the task is; repeated or cut to num_virtual_tokens."""

    @field_validator("init_text")
    @classmethod
    def _belongs_to_init(cls, value: str | None, info: ValidationInfo) -> str | None:
        wanted = info.data.get("init") == "text"
        if wanted and not (value or "").strip():
            raise ValueError("missing; init is text, so give the text to start from")
        if not wanted and value is not None and "init" in info.data:
            raise ValueError(f"is read with init: text alone, and init is {info.data['init']}; remove one of them")
        return value


def width(model: PreTrainedModel) -> int:
    """Return d: how wide an input embedding is."""
    return int(model.get_input_embeddings().weight.shape[1])  # type: ignore[union-attr, index]


def peft_keys(model: PreTrainedModel, tokens: int, task: str) -> dict[str, Any]:
    """Return the fields that every prompt config of peft has.

    The widths of attention are read for prefixes alone; ours are filled in where the architecture calls them otherwise.

    Raises:
        UsageError: The model has no positions left for a row.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and tokens >= positions:
        raise UsageError(f"method.num_virtual_tokens: the model has {positions} positions, got {tokens}; take fewer")
    return {
        "task_type": TASK_TYPES[task],
        "num_virtual_tokens": tokens,
        "token_dim": width(model),
        # With peft's default, 2, an encoder-decoder gets as many rows again, which nothing reads.
        "num_transformer_submodules": 1,
        "num_layers": getattr(config, "num_hidden_layers", 1),
        "num_attention_heads": getattr(config, "num_attention_heads", 1),
    }


def prompt_tuning_model(model: PreTrainedModel, tokens: int, task: str) -> Any:
    """Return a PeftModel with a plain prompt, (tokens, d) in float32, of no particular values."""
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(model, PromptTuningConfig(**peft_keys(model, tokens, task), prompt_tuning_init="RANDOM"))


def as_prompt_tuning(model: Any, prompt: torch.Tensor) -> Any:
    """Return the base of a prompt's model with that prompt alone, which plain peft reads.

    Args:
        model: A PeftModel of any prompt type.
        prompt: (n, d), as the model reads it.
    """
    names = {kind: task for task, kind in TASK_TYPES.items()}
    kind = model.peft_config["default"].task_type
    plain = prompt_tuning_model(model.get_base_model(), len(prompt), names[getattr(kind, "value", kind)])
    set_prompt(plain, prompt)
    return plain.train(model.training)


def set_prompt(peft_model: Any, prompt: torch.Tensor) -> None:
    """Copy (n, d) values into the table of a prompt, in place."""
    peft_model.prompt_encoder["default"].embedding.weight.data.copy_(prompt.detach())


def start_prompt(peft_model: Any, config: InitKeys, context: base.Context) -> None:
    """Give the table of a prompt its first values, in place; nothing on the meta device.

    Raises:
        UsageError: `init: text` is given a text without tokens.
    """
    if peft_model.device.type != "meta":
        set_prompt(peft_model, _first_values(peft_model, config, context))


def _first_values(peft_model: Any, config: InitKeys, context: base.Context) -> torch.Tensor:
    """Return (n, d) in float32."""
    import torch

    n, embedding = config.num_virtual_tokens, peft_model.word_embeddings
    seed = context.recipe.train.seed
    if config.init == "random":
        generator = torch.Generator().manual_seed(seed)
        shape = (n, embedding.weight.shape[1])
        return torch.empty(shape).uniform_(-UNIFORM, UNIFORM, generator=generator)
    ids = _text_ids(config, context) if config.init == "text" else _drawn_ids(n, len(embedding.weight), seed)
    with torch.no_grad():  # what the layer returns, not its rows: some architectures scale them
        return embedding(torch.tensor(ids, device=embedding.weight.device)).float()


def _drawn_ids(n: int, vocabulary: int, seed: int) -> list[int]:
    """Return n token ids, without repetition as far as that goes."""
    population = range(min(COMMON_TOKENS, vocabulary))
    draw = random.Random(f"prompt {seed}")
    return [
        i for first in range(0, n, len(population)) for i in draw.sample(population, min(n - first, len(population)))
    ]


def _text_ids(config: InitKeys, context: base.Context) -> list[int]:
    assert context.tokenizer is not None and config.init_text is not None
    ids = list(context.tokenizer(config.init_text, add_special_tokens=False, verbose=False)["input_ids"])
    if not ids:
        raise UsageError(f"method.init_text: the tokenizer makes no token of {config.init_text!r}; give another text")
    n = config.num_virtual_tokens
    return (ids * math.ceil(n / len(ids)))[:n]
