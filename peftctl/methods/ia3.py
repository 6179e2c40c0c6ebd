"""(IA)^3: Few-Shot Parameter-Efficient Fine-Tuning, Liu et al. 2022 (https://arxiv.org/abs/2205.05638).

    k = l_k * (W_k x + b_k),  v = l_v * (W_v x + b_v),  ffn = W_2 (l_ff * h) + b_2,   l_k, l_v: (kv,), l_ff: (f,)

elementwise, where h: (batch, seq, f) is what the last layer of a feed-forward part reads. Vectors start at 1, so the
model starts as the base; encoder, decoder and cross-attention have their own. In a gated part h is a product with the
gate, so that scaling h is scaling its linear branch, as the paper does. All else is frozen.

Which layers these are is found by structure. peft's own table has q in place of k for Qwen, Gemma, OPT, BART and Phi,
all of a fused qkv, and BERT's attention.output.dense besides. Weight decay pulls towards 0, which erases activations:
the vectors never get any.

T-Few, the paper's recipe around the vectors, adds two losses over wrong answers to the same prompt (`_choices.py`):

    L = L_LM + unlikelihood L_UL + length_normalised L_LN

Both weights are 1 in the paper and 0 in its code's defaults, as here. Rows bring their wrong answers in the field
`wrong_answers`; they count in training only, and a batch holds them besides its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from peftctl.errors import UsageError
from peftctl.methods import _choices, _groups, _heads, _targets, base
from peftctl.methods._lora import TASK_TYPES
from peftctl.recipe.schema import Rate, Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peftctl.data.formats import Example
    from peftctl.models.supervised import Supervised
    from peftctl.recipe.schema import TrainSection


class Config(base.AdapterConfig):
    """The `method:` section of (IA)^3."""

    name: Literal["ia3"] = "ia3"
    unlikelihood: Rate = 0.0
    """Weight of T-Few's loss on the tokens of wrong answers, for rows that have them; the paper has 1."""
    length_normalised: Rate = 0.0
    """Weight of T-Few's cross-entropy between answers by their mean log-probability a token; the paper has 1."""


class Method(base.Method):
    """Learned scales of keys, values and feed-forward activations."""

    Config = Config
    card = base.Card(
        title="(IA)^3",
        paper="Liu et al. 2022, arXiv 2205.05638",
        category="adapter",
        summary="Three vectors a block scale keys, values and the inner activations of the feed-forward part.",
        trains="l_k, l_v and l_ff of every block. peft's table has q in place of k for Qwen, Gemma, OPT, BART and Phi, "
        "and a fourth vector for BERT",
        count="L * (2kv + f), kv for each attention of a block",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        mergeable=True,
        needs="Projections of their own for k and v: an architecture that fuses them with q is refused. T-Few's "
        "two losses need rows with wrong answers.",
        supports=frozenset({"gradient_checkpointing", "resume", "4bit", "8bit"}),
    )

    @property
    def _weights(self) -> dict[str, float]:
        """Weights of the losses over wrong answers, those that count."""
        found = {"unlikelihood": self.config.unlikelihood, "length_normalised": self.config.length_normalised}
        return {name: weight for name, weight in found.items() if weight}

    def prepare_tokenizer(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], recipe: Recipe
    ) -> None:
        """Check that rows have what the losses need; the tokenizer stays as it is."""
        _choices.refuse_without_choices(self._weights, examples)

    def fields(self) -> Sequence[str]:
        """Return the wrong answers, where a loss reads them."""
        return ("choices",) if self._weights else ()

    def loss(
        self, model: Any, batch: Mapping[str, torch.Tensor], forward: Callable[..., Supervised]
    ) -> dict[str, torch.Tensor]:
        """Return the cross-entropy of right answers, and the weighted losses over wrong ones."""
        if not self._weights:
            return super().loss(model, batch, forward)
        right, logits, labels = _choices.forward_with_choices(model, batch, forward)
        parts = {"unlikelihood": _choices.unlikelihood, "length_normalised": _choices.length_normalised}
        owners, rows = batch["choice_rows"], len(batch["labels"])
        extra = {name: weight * parts[name](logits, labels, owners, rows) for name, weight in self._weights.items()}
        return {"loss": right.cross_entropy(), **extra}

    def count(self, model: PreTrainedModel) -> int:
        """Return the sum of d_out over keys and values and of d_in over feed-forward ends, and a classifier's head."""
        scaled, read = chosen(model)
        outputs = sum(_targets.in_out_features(module)[1] for module in scaled.values())
        inputs = sum(_targets.in_out_features(module)[0] for module in read.values())
        return outputs + inputs + _heads.head_parameters(model)

    def notices(self, model: PreTrainedModel) -> list[str]:
        """Return what the vectors scale."""
        scaled, read = (sorted({name.rsplit(".", 1)[-1] for name in names}) for names in chosen(model))
        return [f"scaled: outputs of {', '.join(scaled)}; inputs of {', '.join(read)}"]

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach the vectors."""
        from peft import IA3Config, get_peft_model
        from transformers.pytorch_utils import Conv1D

        from peftctl.tuners.float32_copy import widen_copies

        scaled, read = chosen(model)
        feedforward = _targets.suffixes(model, read)
        config = IA3Config(
            task_type=TASK_TYPES[context.recipe.model.task],
            target_modules=[*_targets.suffixes(model, scaled), *feedforward],
            feedforward_modules=feedforward,
            fan_in_fan_out=all(isinstance(module, Conv1D) for module in scaled.values()),
            modules_to_save=_heads.head_names(model) or None,
        )
        peft_model = get_peft_model(model, config)
        widen_copies(peft_model)
        return peft_model

    def param_groups(self, model: Any, train: TrainSection) -> list[dict[str, Any]]:
        """Return the vectors, without weight decay, and a classifier's head as any other method has it."""
        from peft.tuners.ia3 import IA3Layer

        layers = [module for module in model.modules() if isinstance(module, IA3Layer)]
        vectors, head = _groups.apart(model, (p for layer in layers for p in layer.ia3_l.parameters()))
        return [{"params": vectors, "weight_decay": 0.0}, *_groups.by_decay(head, train)]

    def export(self, model: Any) -> Any:
        """Return the adapter, with a classifier's head in the base's type, as peft loads it."""
        from peftctl.tuners.float32_copy import narrow_copies

        narrow_copies(model)
        return model


def chosen(model: PreTrainedModel) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Return (layers whose outputs are scaled, layers whose inputs are), by name.

    Raises:
        UsageError: The architecture has no such layers.
    """
    from torch import nn

    from peftctl.models.anatomy import key_value_layers, sublayer_ends

    linear = {n: m for n, m in _targets.adaptable_modules(model).items() if not isinstance(m, nn.Embedding)}
    scaled = key_value_layers(model, linear)
    try:
        read = sublayer_ends(model, linear)["mlp"]
    except UsageError as error:  # it speaks of a key that this section does not have
        raise UsageError(
            f"where the feed-forward parts of the {model.config.model_type} architecture end is not known here; "
            "take another method, or method.name: peft with type: IA3 and its target_modules"
        ) from error
    return {name: linear[name] for name in scaled}, {name: linear[name] for name in read}
