"""LST: Ladder Side-Tuning, Sung, Cho, Bansal 2022, NeurIPS 2022 (https://arxiv.org/abs/2206.06522).

    s_0 = Down_0(h_0),   h_0: what the first block reads, h_i: what block i returns, both cut off from the graph
    s <- μ_i s + (1 - μ_i) Down_i(h_i),   μ_i = σ(α_i / T);   s <- SideBlock_i(s)        for every k-th block i
    y = Up(norm(s))                       goes to the frozen head, in the place of the base's last state

A network of width d / r beside the base reads its states; the base gives no gradient, so that nothing of it is kept for
a backward pass but the h_i themselves, from which the gradients of Down_i are made. α_i starts at 0.

Where we differ: with `merge_last`, y = norm(h_L) + Up(norm(s)) with Up = 0 at first, so that training starts at the
base instead of at logits of no meaning. (The authors' code has a gate between the two behind a flag.) A side block has
heads as wide as the base's and fewer of them, so that it takes the base's rotary angles; the paper has as many, r times
narrower. Rungs are counted from the last block, which always has one.
Not verified: T = 0.1; that the authors draw Down and Up as new linear layers when blocks start from the base's weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from peftctl.errors import UsageError
from peftctl.methods import _groups, base
from peftctl.methods._lora import TASK_TYPES
from peftctl.recipe.schema import Positive, TrainSection

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Config(base.AdapterConfig):
    """The `method:` section of ladder side-tuning."""

    name: Literal["ladder_side_tuning"] = "ladder_side_tuning"
    reduction: Positive = 8
    """r: the side network is d / r wide, its feed-forward part too."""
    every: Positive = 2
    """k: every k-th block of the base has a rung, counted from the last."""
    gate_temperature: Annotated[float, Field(gt=0)] = 0.1
    """T."""
    merge_last: bool = True
    """Add the side's output to the base's last state, from 0 on; false puts it in its place, as the paper does."""
    init: Literal["fisher", "magnitude", "random"] = "magnitude"
    """Side blocks start from the base's rows and columns with the largest Fisher information or the largest weights, or
    as new ones."""
    rows: Positive = 128
    """Training rows that `fisher` looks at, at most all of them."""


class Method(base.Method):
    """A narrow network beside the base."""

    Config = Config
    card = base.Card(
        title="Ladder Side-Tuning",
        paper="Sung et al. 2022, arXiv 2206.06522",
        category="adapter",
        summary="A narrow transformer beside the base reads its states; no gradient passes through the base.",
        trains="down- and up-projections, gates, narrow blocks and norm of the side network",
        count="(L_s + 1) * (d * d_s + d_s) + (d_s * d + d) + L_s + L_s * block(d_s, d_ff / r) + norm(d_s), d_s = d / r",
        merge_note="a side network is a network of its own, no weight of the base can take it up",
        supports=frozenset({"4bit", "8bit", "gradient_checkpointing", "resume"}),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the projections', the gates', the narrow blocks' and the norm's parameters."""
        import torch

        from peftctl.tuners.ladder_stack import find_stack, kept_layers, narrow_stack

        with torch.device("meta"):
            blocks, norm = narrow_stack(model, find_stack(model), self.config.reduction)
        d = model.config.get_text_config().hidden_size
        narrow, layers = d // self.config.reduction, kept_layers(len(blocks), self.config.every)
        inside = sum(p.numel() for module in (norm, *(blocks[i] for i in layers)) for p in module.parameters())
        rungs = len(layers)
        return (rungs + 1) * (d * narrow + narrow) + narrow * d + d + rungs + inside

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach a side network with blocks as the library draws them."""
        from peft import get_peft_model

        from peftctl.models.quantize import is_quantized
        from peftctl.tuners.ladder import LadderConfig, refuse_what_fails
        from peftctl.tuners.ladder_stack import find_stack, kept_layers

        if self.config.init == "fisher" and (context.recipe.quantization.bits or is_quantized(model)):
            raise UsageError(
                "method.init: quantised weights have no gradient to score them by; take magnitude or random"
            )
        stack = find_stack(model)
        config = LadderConfig(
            task_type=TASK_TYPES[context.recipe.model.task],
            reduction=self.config.reduction,
            layers=kept_layers(len(stack.block_list(model)), self.config.every),
            temperature=self.config.gate_temperature,
            merge_last=self.config.merge_last,
            target_modules=[stack.target],
        )
        without_weights = model.device.type == "meta"
        with model.device if without_weights else nullcontext():
            peft_model = get_peft_model(model, config)
        if not without_weights:
            refuse_what_fails(peft_model)
        return peft_model

    def calibrate(self, model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Fill the side's blocks from the base's, where the section says so."""
        from peftctl.tuners.ladder_pruning import fill, fisher

        if self.config.init != "random":
            fill(model, fisher(model, islice(batches, self.config.rows)) if self.config.init == "fisher" else None)

    def param_groups(self, model: Any, train: TrainSection) -> list[dict[str, Any]]:
        """Return matrices, which decay, and the rest, which does not: gates that decay would forget what they chose."""
        return _groups.by_decay((p for p in model.parameters() if p.requires_grad), train)
