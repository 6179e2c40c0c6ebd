"""BitFit: bias terms alone, Ben Zaken, Ravfogel and Goldberg 2022 (https://arxiv.org/abs/2106.10199).

    y = W x + b,   LayerNorm(x) = g * (x - mean) / std + b

Every vector b trains, those of LayerNorms included; W and g stay frozen. `biases: query_and_mlp` trains only those of
the query and of the first feed-forward layer, which the paper's section 4 finds to be enough: half as many.

Biases change in place, as in the authors' code: there is no second copy to switch off. They are float32 under autocast
in the recipe's dtype, since bfloat16 rounds most of their updates away. The head of a classifier trains with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from peftctl.errors import UsageError
from peftctl.methods import base
from peftctl.methods._heads import head_names, head_parameters, unknown_to_peft
from peftctl.methods._lora import TASK_TYPES

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_QUERIES = ("query", "q_proj", "q_lin", "query_proj", "q")
"""What architectures call the layer of the queries."""


class Config(base.MethodConfig):
    """The `method:` section of BitFit."""

    name: Literal["bitfit"] = "bitfit"
    biases: Literal["all", "query_and_mlp"] = "all"
    """Which train: `all`, or those of queries and of the first feed-forward layers."""


class Method(base.Method):
    """Bias vectors."""

    Config = Config
    autocast = True
    card = base.Card(
        title="BitFit",
        paper="Ben Zaken et al. 2022, arXiv 2106.10199",
        category="selective",
        summary="The bias vectors train, about a thousandth of an encoder; architectures without biases are refused.",
        trains="every bias, or those of queries and first feed-forward layers; a classifier's head",
        count="sum of the sizes of the biases, plus the head",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        mergeable=True,
        disable_note="the trained biases stand in the place of the base's, and stay there",
        needs="an architecture with biases: BERT, RoBERTa, OPT, GPT-2, BART; Llama and T5 have none",
        supports=frozenset({"gradient_checkpointing", "resume"}),
    )

    def load_options(self) -> base.LoadOptions:
        """Ask for float32: an addition of a float32 bias to a half-type product is no kernel's."""
        return base.LoadOptions(dtype="float32")

    def count(self, model: PreTrainedModel) -> int:
        """Return the sizes of the chosen biases, plus the head's."""
        return sum(bias.numel() for bias in self._chosen(model).values()) + head_parameters(model)

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Let the biases train, in an adapter that holds them and nothing else."""
        from peft import LoraConfig, get_peft_model
        from peft.utils.constants import DUMMY_TARGET_MODULES

        chosen = self._chosen(model)
        own = unknown_to_peft(model)
        config = LoraConfig(
            task_type=TASK_TYPES[context.recipe.model.task],
            r=1,
            target_modules=DUMMY_TARGET_MODULES,
            bias="all",
            modules_to_save=list(own) or None,
        )
        peft_model = get_peft_model(model, config)
        config.modules_to_save = own or None  # peft adds its own names again when it loads
        wanted = {id(bias) for bias in chosen.values()}
        for name, parameter in peft_model.named_parameters():
            parameter.requires_grad_(id(parameter) in wanted or ".modules_to_save." in name)
        return peft_model

    def _chosen(self, model: PreTrainedModel) -> Mapping[str, torch.Tensor]:
        """Return the biases that train, by name, without the head's.

        Raises:
            UsageError: There are none.
        """
        head = tuple(f"{name}." for name in head_names(model))
        found = {
            name: p for name, p in model.named_parameters() if name.endswith(".bias") and not name.startswith(head)
        }
        kind = model.config.model_type
        if not found:
            raise UsageError(
                f"method.name: bitfit trains biases, and the {kind} architecture has none; take lora, ia3 or "
                "last_layers, or a model with biases, e.g. BERT, OPT or GPT-2"
            )
        if self.config.biases == "all":
            return found
        chosen = {name: bias for name, bias in found.items() if name.removesuffix(".bias") in _query_and_mlp(model)}
        if not chosen:
            raise UsageError(
                f"method.biases: no query and no first feed-forward layer is known for the {kind} architecture; "
                "set it to all"
            )
        return chosen


def _query_and_mlp(model: PreTrainedModel) -> set[str]:
    """Return the names of the layers that make queries, and of those that widen the feed-forward part."""
    from peftctl.methods._targets import adaptable_modules, in_out_features
    from peftctl.models.anatomy import linear_parts

    layers = adaptable_modules(model)
    queries = {name for name in layers if name.rsplit(".", 1)[-1] in _QUERIES}
    sizes = {name: in_out_features(layers[name]) for name in linear_parts(model, list(layers))["mlp"]}
    return queries | {name for name, (d_in, d_out) in sizes.items() if d_out > d_in}
