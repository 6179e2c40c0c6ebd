"""VeRA: Vector-based Random Matrix Adaptation, Kopiczko et al. 2024 (https://arxiv.org/abs/2310.11454).

    y = W x + bias + b * (B (d * (A x))),   A: (r, max d_in), B: (max d_out, r), d: (r,), b: (d_out,)

One random pair A, B serves all targets, which take its first d_in columns and first d_out rows; it is frozen and drawn
from `projection_seed`, Kaiming-uniform: U(+-sqrt(6 / max d_in)) and U(+-sqrt(6 / r)). Only the vectors train, from
d = 0.1 and b = 0, so the model starts as the base; there is no alpha. A and B lie once in memory and once in the file:
another version of torch may draw other numbers from a seed. A classifier's head trains whole, at a rate of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from peftctl.errors import UsageError
from peftctl.methods import _groups, _heads, _targets, base
from peftctl.methods._lora import TASK_TYPES
from peftctl.recipe.schema import Count, Positive

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftctl.recipe.schema import TrainSection


class Config(base.AdapterConfig):
    """The `method:` section of VeRA."""

    name: Literal["vera"] = "vera"
    r: Positive = 256
    """Rank of the shared projections; larger than a LoRA's, as it costs r parameters a target."""
    d_initial: Annotated[float, Field(gt=0)] = 0.1
    """What d starts at; the paper's choice among 1, 0.1 and 1e-7."""
    projection_seed: Count = 0
    """What A and B are drawn from; adapters of one model must share it."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input, in training only."""
    head_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Of a classifier's head, which the vectors' would be too large for; left out, train.learning_rate."""
    target_modules: str | list[str] | None = None
    """Name suffixes, a regular expression, or `all-linear`, `attention`, `mlp`; left out, peft's choice for the
    architecture."""


class Method(base.Method):
    """Two vectors a layer around random matrices that all layers share."""

    Config = Config
    card = base.Card(
        title="VeRA",
        paper="Kopiczko et al. 2024, arXiv 2310.11454",
        category="lora",
        summary="Two vectors a layer scale one frozen random pair A, B that all layers share: very few parameters.",
        trains="b and d of every target",
        count="sum over targets of d_out + r; plus a classifier's head",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        mergeable=True,
        supports=frozenset({"gradient_checkpointing", "resume", "4bit", "8bit"}),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the sum over targets of d_out + r, and a classifier's head."""
        vectors = sum(_targets.in_out_features(module)[1] + self.config.r for module in self._chosen(model).values())
        return vectors + _heads.head_parameters(model)

    def notices(self, model: PreTrainedModel) -> list[str]:
        """Return what the targets matched, where the recipe does not tell."""
        if self.config.target_modules is not None:
            return []
        return [f"target_modules: {', '.join(_targets.suffixes(model, self._chosen(model)))} (peft's choice)"]

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach the vectors to the targets, and draw A and B."""
        from peft import VeraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        from peftctl.tuners.float32_copy import widen_copies

        chosen, keys = self._chosen(model), self.config
        config = VeraConfig(
            task_type=TASK_TYPES[context.recipe.model.task],
            r=keys.r,
            d_initial=keys.d_initial,
            projection_prng_key=keys.projection_seed,
            save_projection=True,
            vera_dropout=keys.dropout,
            target_modules=_targets.suffixes(model, chosen),
            fan_in_fan_out=all(isinstance(module, Conv1D) for module in chosen.values()),
            modules_to_save=_heads.head_names(model) or None,
        )
        with model.device if model.device.type == "meta" else nullcontext(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # peft finds each layer's own
            peft_model = get_peft_model(model, config)
        widen_copies(peft_model)
        return peft_model

    def param_groups(self, model: Any, train: TrainSection) -> list[dict[str, Any]] | None:
        """Return the vectors, which don't decay, and a classifier's head with a rate of its own."""
        from peft.tuners.vera.layer import VeraLayer

        layers = [module for module in model.modules() if isinstance(module, VeraLayer)]
        own = (p for layer in layers for p in (*layer.vera_lambda_b.values(), *layer.vera_lambda_d.values()))
        vectors, head = _groups.apart(model, own)
        rate = self.config.head_learning_rate or train.learning_rate
        return [{"params": vectors, "weight_decay": 0.0}, *_groups.by_decay(head, train, lr=rate)]

    def export(self, model: Any) -> Any:
        """Return the adapter, with a classifier's head in the base's type, as peft loads it."""
        from peftctl.tuners.float32_copy import narrow_copies

        narrow_copies(model)
        return model

    def state_dict(self, model: Any) -> dict[str, Any]:
        """Return A and B: `init_from` may have brought them."""
        return {name: shared["default"].cpu() for name, shared in _projections(model).items()}

    def load_state_dict(self, model: Any, state: Mapping[str, Any]) -> None:
        """Restore A and B."""
        for name, shared in _projections(model).items():
            shared["default"].copy_(state[name])

    def _chosen(self, model: PreTrainedModel) -> dict[str, Any]:
        from torch import nn

        matched = _targets.matched_modules(model, _targets.resolve_targets(model, self.config.target_modules))
        heads = set(_heads.head_names(model))
        chosen = {name: module for name, module in matched.items() if name.split(".")[0] not in heads}
        for name, module in chosen.items():
            if isinstance(module, nn.Embedding):
                raise UsageError(f"method.target_modules: {name} is an embedding; vera takes linear layers only")
        return chosen


def _projections(model: Any) -> dict[str, Any]:
    """Return the dictionaries of A and of B, which every layer refers to."""
    return {"A": model.base_model.vera_A, "B": model.base_model.vera_B}
