"""What the methods share that put trained keys and values before those of the text in every attention layer."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from peftctl.errors import UsageError
from peftctl.methods import base
from peftctl.methods._heads import head_parameters, unknown_to_peft
from peftctl.methods._lora import TASK_TYPES
from peftctl.recipe.schema import Positive

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftctl.tuners.prefix import CacheShape, TrainedPrefix

MERGE_NOTE = "the keys and values of the prefix stand before those of the text: no weight of the base holds them"
IDENTITY_NOTE = "any prefix takes a share of the attention, keys of zero too"
CHECKPOINTING = (
    "Gradient checkpointing is refused: the library then drops the cache that carries the prefix, with a log line only."
)


class PrefixKeys(base.MethodConfig):
    """Keys that every method of the family reads."""

    num_virtual_tokens: Positive = 20
    """n: keys and values a layer; the text has so many positions less."""
    projection: bool = False
    """Train a small network that makes the keys and values; only what it makes is saved."""
    hidden: Positive = 512
    """Width of that network."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the prefix's keys and values, in training only."""
    init_std: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation of the table at the start; 1 in the authors' code."""


class PrefixMethod(base.Method):
    """n trained keys and values before those of the text, in every layer; the base is frozen."""

    config: PrefixKeys

    def count(self, model: PreTrainedModel) -> int:
        """Return n 2L kv, or the network's n kv + (kv m + m) + (m 2L kv + 2L kv), plus the head of a classifier."""
        from peftctl.tuners.prefix import cache_shape

        shape = cache_shape(model)
        n, m = self.config.num_virtual_tokens, self.config.hidden
        table = (
            n * shape.width + (shape.width + 1) * m + (m + 1) * shape.row if self.config.projection else n * shape.row
        )
        return table + head_parameters(model)

    def notices(self, model: PreTrainedModel) -> list[str]:
        """Return how many tokens of a row are left where the model has a fixed table of positions."""
        positions = _position_rows(model)
        if positions is None:
            return []
        n = self.config.num_virtual_tokens
        if positions <= n:
            raise UsageError(f"method.num_virtual_tokens: must be below the model's {positions} positions, got {n}")
        return [f"the prefix takes {n} of the model's {positions} positions: a row may have {positions - n} tokens"]

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Freeze the base and put a float32 prefix before every layer's keys and values.

        Raises:
            UsageError: The architecture takes no prefix.
        """
        from peft import get_peft_model

        from peftctl.tuners.float32_copy import widen_copies
        from peftctl.tuners.prefix import TrainedPrefix, cache_shape

        self._refuse_head(model)
        shape = cache_shape(model)
        paired = bool(model.config.is_encoder_decoder)
        keys = self.config
        with model.device if model.device.type == "meta" else nullcontext(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*gradient checkpointing")
            prefix = TrainedPrefix(
                keys.num_virtual_tokens,
                shape,
                hidden=keys.hidden if keys.projection else None,
                dropout=keys.dropout,
                std=keys.init_std,
                paired=paired,
            ).to(model.device)
            self.start(prefix, model, context)
            peft_model = get_peft_model(model, self._peft_config(shape, paired, context.recipe.model.task))
        peft_model.prompt_encoder["default"] = prefix
        widen_copies(peft_model)
        return peft_model

    def start(self, prefix: TrainedPrefix, model: PreTrainedModel, context: base.Context) -> None:
        """Give a prefix other values to start from than random ones."""

    def export(self, model: Any) -> Any:
        """Return a plain PREFIX_TUNING adapter: a flat table of keys and values, and the head of a classifier."""
        from peftctl.tuners.float32_copy import narrow_copies
        from peftctl.tuners.prefix import flatten_prefix

        flatten_prefix(model)
        narrow_copies(model)
        return model

    def _refuse_head(self, model: PreTrainedModel) -> None:
        """Raise where peft, which runs the head itself behind a prefix, would leave a part of it out."""
        if parts := unknown_to_peft(model):
            raise UsageError(
                f"method.name: the {model.config.model_type} architecture takes no prefix: its head has a part, "
                f"{parts[0]}, that peft does not run behind one"
            )

    def _peft_config(self, shape: CacheShape, paired: bool, task: str) -> Any:
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            task_type=TASK_TYPES[task],
            num_virtual_tokens=self.config.num_virtual_tokens,
            # peft deals the rows of an encoder-decoder to self- and cross-attention in turn, and drops the latter.
            num_layers=shape.layers * (2 if paired else 1),
            num_transformer_submodules=2 if paired else 1,
            num_attention_heads=shape.heads,
            token_dim=shape.width,
        )


def _position_rows(model: PreTrainedModel) -> int | None:
    """Return how many positions the model has a learned vector for; None where it computes them."""
    from torch import nn

    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in (leaf := name.rsplit(".", 1)[-1]) or leaf == "wpe")
    ]
    if not tables:
        return None
    # RoBERTa counts from behind its padding id, OPT and BART from their offset.
    return min(t.num_embeddings - max((t.padding_idx or -1) + 1, getattr(t, "offset", 0)) for t in tables)
