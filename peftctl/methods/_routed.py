"""What methods with mixtures of experts share: keys, count, how experts are attached, their load, losses on routing.

A line of metrics.jsonl has `expert_load/<block>/<e>`: the share of expert e in block <block> since the last line. That
is the mean of its probability, or with top-k its share of what tokens chose, over the tokens without padding and the
layers of the block; the shares of a block sum to 1. Blocks have numbers; those of encoder-decoders their names, and so
have layers outside of blocks. Of several processes the first one's tokens count.

No expert has weight decay or momentum move it in a step in which no gradient has reached it: `_StandStill` takes the
zero gradients of its A and B away, which an optimizer then passes over. Engines that divide gradients (ZeRO, FSDP) keep
no such change: there an idle expert goes on with its momentum and weight decay.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from peftctl.errors import UsageError
from peftctl.methods import _heads, _targets, base
from peftctl.methods._lora import TASK_TYPES
from peftctl.recipe.schema import Positive

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel

    from peftctl.models.supervised import Supervised
    from peftctl.tuners.routing import Init, Routing

TASKS = ("causal_lm", "seq2seq_lm", "seq_cls", "token_cls")
SUPPORTS: frozenset[base.Feature] = frozenset({"4bit", "8bit", "gradient_checkpointing", "resume"})
COUNT = "sum over targets of E * (r * (d_in + d_out) + d_in), plus the head"
MERGE_NOTE = "every token weighs the experts anew, no weight of the base can take them up"

_CROSS = re.compile(
    r".*(EncDecAttention|encoder_attn|cross_?attn|cross_?attention)\.(.*\.)?(k|v|key|value)(_proj)?", re.I
)
"""Layers of a decoder that read what the encoder returned."""


class RoutedKeys(base.AdapterConfig):
    """Keys that every mixture of LoRA experts reads."""

    r: Positive = 4
    """Rank of every expert."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """Scale: the sum of the experts is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on what the experts read, in training only; the router reads it without."""
    target_modules: str | list[str] = "all-linear"
    """Name suffixes, a regular expression, or `all-linear`, `attention`, `mlp`."""


@dataclass(frozen=True)
class Routed:
    """How the tokens of a micro-batch were routed in one layer.

    Args:
        name: Of the layer in the base model.
        probabilities: (batch, seq, E), with their graph.
        gates: (batch, seq, E), what the experts were weighed with; 0 for those that top-k left out.
        mask: (batch, seq), 1 for tokens and 0 for padding, in the type of the probabilities.
    """

    name: str
    probabilities: torch.Tensor
    gates: torch.Tensor
    mask: torch.Tensor

    def chosen(self) -> torch.Tensor:
        """Return what tokens chose, (batch, seq, E), without a graph: p where all have all, else 1 and 0."""
        if self.gates is self.probabilities:
            return self.gates.detach()
        return (self.gates > 0).to(self.mask.dtype)


class RoutedMethod(base.Method):
    """A router and experts beside every target."""

    whole_batches = True  # losses on the routing are over all tokens of a micro-batch

    def __init__(self, config: Any):
        super().__init__(config)
        self.load = _Load()

    @property
    def k(self) -> int | None:
        """How many experts a token has; None for all."""
        return None

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach routers and experts, and train a classifier's head beside them."""
        from peft import get_peft_model

        from peftctl.tuners.float32_copy import widen_copies

        self.load = _Load(every=context.recipe.train.logging_steps)
        config = self._tuner(model)
        config.task_type = TASK_TYPES[context.recipe.model.task]
        config.modules_to_save = _heads.unknown_to_peft(model) or None  # type: ignore[attr-defined]
        # Without weights there is nothing to draw or copy; peft would make its tensors on the CPU all the same.
        with model.device if model.device.type == "meta" else nullcontext():
            peft_model = get_peft_model(model, config)
        widen_copies(peft_model)
        return peft_model

    def callbacks(self, model: Any) -> Sequence[base.Callback]:
        """Return what logs the load of the experts, and what keeps idle ones where they are."""
        logs = _LogLoad(self.load)
        return (logs,) if self.k is None else (logs, _StandStill())

    def loss(
        self, model: Any, batch: Mapping[str, torch.Tensor], forward: Callable[..., Supervised]
    ) -> dict[str, torch.Tensor]:
        """Return the cross-entropy and the method's losses on the routing, and count the load of the experts."""
        from peftctl.tuners.routing import recording

        with recording(model) as found:
            result = forward({name: value for name, value in batch.items() if name != "task_ids"})
        routed = _of_tokens(model, found, batch)
        self.load.count(routed)
        return {"loss": result.cross_entropy(), **self.routing_losses(routed, batch)}

    def routing_losses(self, routed: Sequence[Routed], batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return losses on the routing of a micro-batch, by their names in metrics.jsonl."""
        return {}

    def export(self, model: Any) -> Any:
        """Return the adapter, with a classifier's head in the base's type, as peft loads it."""
        from peftctl.tuners.float32_copy import narrow_copies

        narrow_copies(model)
        return model

    def _tuner(self, model: PreTrainedModel) -> PeftConfig:
        """Return the configuration of the tuner, without task type and head."""
        raise NotImplementedError


class RoutedLoraMethod(RoutedMethod):
    """A mixture of LoRA experts."""

    config: Any
    init: ClassVar[Init] = "kaiming"
    renormalise: ClassVar[bool] = False

    def experts(self, model: PreTrainedModel, names: Sequence[str]) -> Mapping[str, int]:
        """Return how many experts every target has."""
        return dict.fromkeys(names, self.config.experts)

    def count(self, model: PreTrainedModel) -> int:
        """Return the sum of E (r (d_in + d_out) + d_in) over the targets, plus a new head."""
        chosen = self._chosen(model)
        counts = self.experts(model, list(chosen))
        sizes = {name: _targets.in_out_features(module) for name, module in chosen.items()}
        own = sum(counts[n] * (self.config.r * (d_in + d_out) + d_in) for n, (d_in, d_out) in sizes.items())
        return own + _heads.head_parameters(model)

    def _tuner(self, model: PreTrainedModel) -> PeftConfig:
        from peftctl.tuners.routed import RoutedLoraConfig

        names = list(self._chosen(model))
        counts = self.experts(model, names)
        common = counts[names[0]]
        return RoutedLoraConfig(
            experts=common,
            experts_of={name: experts for name, experts in counts.items() if experts != common},
            r=self.config.r,
            alpha=self.config.alpha,
            dropout=self.config.dropout,
            k=self.k,
            renormalise=self.renormalise,
            init=self.init,
            target_modules=_targets.suffixes(model, names),
        )

    def _chosen(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        from torch import nn

        heads = _heads.head_names(model)
        found = _targets.matched_modules(model, self.config.target_modules)
        chosen = {n: m for n, m in found.items() if not any(n == head or n.startswith(head + ".") for head in heads)}
        for name, module in chosen.items():
            if isinstance(module, nn.Embedding):
                raise UsageError(
                    f"method.target_modules: {name} is an embedding; {self.config.name} takes linear layers only"
                )
        if not chosen:
            raise UsageError("method.target_modules: selects the classifier's head only, which trains whole")
        return chosen


def block_of(name: str) -> tuple[str, int] | None:
    """Return the stack of blocks that a layer is in, and the number of the block; None outside of blocks."""
    found = re.match(r"(.*?)\.(\d+)\.", name)
    return (found[1], int(found[2])) if found else None


def _of_tokens(model: Any, found: Mapping[str, Routing], batch: Mapping[str, torch.Tensor]) -> list[Routed]:
    """Return the routing of a micro-batch, position by position, with what is padding.

    A layer that saw neither the tokens of the batch nor one state a row is left out: the base chose tokens for it.
    """
    from peftctl.models.supervised import IGNORED

    trains = (batch["labels"] != IGNORED).any()  # a process without rows takes part with a token of padding
    encoded = batch["attention_mask"].bool() & trains
    inside_decoder = _decoder(model)
    routed = []
    for name, routing in found.items():
        decodes = inside_decoder and name.startswith(inside_decoder) and not _CROSS.fullmatch(name)
        mask = batch["labels"] != IGNORED if decodes else encoded
        p = routing.probabilities
        rows, seen = len(mask), p.shape[:-1].numel()
        if seen not in (mask.numel(), rows):
            continue
        if seen != mask.numel():
            mask = mask.any(dim=1, keepdim=True)
        shape = (*mask.shape, p.shape[-1])
        p = p.reshape(shape)
        gates = p if routing.gates is routing.probabilities else routing.gates.reshape(shape)
        routed.append(Routed(name, p, gates, mask.to(p.device, p.dtype)))
    return routed


def _decoder(model: Any) -> str | None:
    """Return what the names of the decoder's layers begin with in an encoder-decoder; None elsewhere."""
    if not model.config.is_encoder_decoder:
        return None
    base_model = model.get_base_model()
    return next(name for name, m in base_model.named_modules() if m is base_model.get_decoder()) + "."


class _Load:
    """The load of the experts since the last line of metrics.jsonl.

    Args:
        every: Optimizer steps between two lines.
    """

    def __init__(self, every: int = 1):
        self.every = every
        self.sums: dict[str, torch.Tensor] = {}  # block -> (E,)

    def count(self, routed: Sequence[Routed]) -> None:
        """Add a micro-batch."""
        stacks = {block[0] for layer in routed if (block := block_of(layer.name))}
        for layer in routed:
            block = block_of(layer.name)
            label = layer.name if block is None else str(block[1]) if len(stacks) == 1 else f"{block[0]}.{block[1]}"
            share = layer.chosen().flatten(0, 1)
            total = layer.mask.flatten() @ share
            self.sums[label] = self.sums[label] + total if label in self.sums else total

    def shares(self) -> dict[str, float]:
        """Return the share of every expert of every block, and begin anew."""
        named = {}
        for label, total in self.sums.items():
            for expert, share in enumerate((total / total.sum().clamp(min=1e-9)).tolist()):
                named[f"expert_load/{label}/{expert}"] = round(share, 4)
        self.sums.clear()
        return named


class _LogLoad(base.Callback):
    """Writes the load where a line of metrics.jsonl is due: reading it makes the host wait for the device."""

    def __init__(self, load: _Load):
        self.load = load

    def after_step(self, info: base.StepInfo) -> None:
        """Give the shares to the next line."""
        if info.step in (1, info.total_steps) or info.step % self.load.every == 0:
            info.log.update(self.load.shares())


class _StandStill(base.Callback):
    """Takes the gradients of idle experts away, so that the optimizer passes over them.

    B tells who is idle: A has a gradient of 0 as long as B is 0, also where tokens chose the expert.
    """

    def before_optimizer(self, info: base.StepInfo) -> None:
        """Look at all gradients at once: every look makes the host wait for the device."""
        import torch

        from peftctl.tuners.routed import LoraExperts

        with info.whole():
            experts = [module for module in info.model.modules() if isinstance(module, LoraExperts)]
            pairs = [pair for module in experts for pair in module.pairs() if pair[1].grad is not None]
            largest = torch._foreach_norm([b.grad for _, b in pairs if b.grad is not None], torch.inf)
            for (a, b), norm in zip(pairs, torch.stack(largest).tolist(), strict=True):
                if norm == 0:
                    a.grad = b.grad = None
