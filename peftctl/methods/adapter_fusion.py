"""AdapterFusion: attention over finished adapters, Pfeiffer et al. 2020 (https://arxiv.org/abs/2005.00247).

    a_i = U_i φ_i(D_i h + b_i1) + b_i2,   q = Wq h + bq,   k_i = Wk a_i,   p = softmax_i(q · k_i)
    change(h) = Σ_i p_i Wv a_i,           loss = cross-entropy + value_penalty Σ |I - Wv|_F^2

h is what the adapters read, and the sum is added where each of them added its own change a_i. The first stage of the
paper are runs of their own: `adapters` names their results, which are frozen here, together with the base. Each may
have its m and φ; they must stand at the same places, and nothing but them and a head may have trained: of Houlsby's
that takes `train_norms: false`, since of several sets of norms a model can only have one. Heads of the earlier runs
are left behind. The artefact holds the adapters too and needs none of the runs.

Wq and Wk are drawn with a deviation of 0.02, bq is 0, and Wv is the identity but for 1e-6: the model starts near the
mean of its adapters, not as the base. As in the authors' code there is no division by √d, Wv has no bias and stands
behind the sum, and h is what comes out of the block's LayerNorm where there is one. There is no dropout on the scores,
theirs is 0 too. Keys have no bias here: k_i = Wk a_i + bk gives the same p for every bk, whose gradient would be only
rounding. So a place trains 3d^2 + d numbers, where the paper's form has 3d^2 + 2d.

Not verified: the paper's learning rate (5e-5), batch (32) and epochs (10) of this stage.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from peftctl.errors import RunError, UsageError
from peftctl.methods import _heads, base
from peftctl.methods._earlier import adapter_folder
from peftctl.methods._lora import TASK_TYPES
from peftctl.methods._targets import in_out_features
from peftctl.recipe.schema import Rate

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from peftctl.models.supervised import Supervised
    from peftctl.tuners.finished_adapters import Finished

KEY = "method.adapters"


class Config(base.MethodConfig):
    """The `method:` section of AdapterFusion."""

    name: Literal["adapter_fusion"] = "adapter_fusion"
    adapters: Annotated[list[str], Field(min_length=1, max_length=16)]
    """Finished runs or adapter directories, of houlsby without norms or of pfeiffer, on this base."""
    value_penalty: Rate = 0.01
    """What Σ |I - Wv|_F^2 is multiplied by in the loss."""


class Method(base.Method):
    """Attention over several adapters at every place where they stand."""

    Config = Config
    config: Any
    loss_reads_weights = True
    card = base.Card(
        title="AdapterFusion",
        paper="Pfeiffer et al. 2020, arXiv 2005.00247",
        category="adapter",
        summary="Combines finished adapters of several tasks by attention over what each of them adds, token by token.",
        trains="Wq, its bias, Wk and Wv at every place where the adapters stand; a classifier's head",
        count="places * (3d^2 + d), plus the head; the adapters are frozen",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        merge_note="neither the adapters nor the attention over them are linear",
        identity_at_init=False,
        identity_note="it starts as about the mean of the adapters that it combines",
        needs="Finished adapters, as `adapters`, which run side by side in every block.",
        supports=frozenset({"4bit", "8bit", "gradient_checkpointing", "resume"}),
    )

    def inputs(self) -> Mapping[str, Sequence[str]]:
        """Return the runs whose adapters are combined."""
        return {KEY: self.config.adapters}

    def count(self, model: PreTrainedModel) -> int:
        """Return 3d^2 + d over the places, plus a new head."""
        widths = self._finished(model)[0].widths.values()
        return sum(3 * d * d + d for d in widths) + _heads.head_parameters(model)

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Put the frozen adapters and a fusion where the adapters have stood."""
        from dataclasses import replace

        from peft import get_peft_model

        from peftctl.tuners.finished_adapters import fill
        from peftctl.tuners.float32_copy import widen_copies

        finished = self._finished(model)
        config = replace(
            finished[0].config,
            task_type=TASK_TYPES[context.recipe.model.task],
            kind="fusion",
            options={
                "bottlenecks": [adapter.config.bottleneck for adapter in finished],
                "activations": [adapter.config.activation for adapter in finished],
                "fused": [{"name": adapter.label, "sha256": adapter.sha256} for adapter in finished],
            },
            modules_to_save=_heads.unknown_to_peft(model) or None,
            inference_mode=False,
        )
        # Without weights there is nothing to draw or copy; torch says so of every tensor.
        with model.device if model.device.type == "meta" else nullcontext(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            peft_model = get_peft_model(model, config)
        if model.device.type != "meta":
            fill(peft_model, finished)
        widen_copies(peft_model)
        return peft_model

    def loss(
        self, model: Any, batch: Mapping[str, torch.Tensor], forward: Callable[..., Supervised]
    ) -> dict[str, torch.Tensor]:
        """Return the cross-entropy, and how far the Wv are from the identity."""
        from peftctl.tuners.fused_perceptrons import identity_distance

        parts = super().loss(model, batch, forward)
        if self.config.value_penalty:
            parts["value_identity"] = self.config.value_penalty * identity_distance(model)
        return parts

    def state_dict(self, model: Any) -> dict[str, Any]:
        """Return which adapters are combined: they are read from their runs again."""
        return {"fused": model.peft_config["default"].options["fused"]}

    def load_state_dict(self, model: Any, state: Mapping[str, Any]) -> None:
        """Compare the adapters.

        Raises:
            RunError: One is no longer what it was when this run began.
        """
        for now, then in zip(self.state_dict(model)["fused"], state["fused"], strict=True):
            if now != then:
                raise RunError(
                    f"{KEY}: {then['name']} has been trained anew since this run began; put it back, or start with "
                    "--fresh"
                )

    def export(self, model: Any) -> Any:
        """Return the adapters with their fusion, a classifier's head in the base's type, as peft loads it."""
        from peftctl.tuners.float32_copy import narrow_copies

        narrow_copies(model)
        return model

    def _finished(self, model: PreTrainedModel) -> list[Finished]:
        """Return what the adapters are.

        Raises:
            UsageError: One is not there, of another kind, shape or base, or trained more than adapters and a head.
        """
        from peftctl.tuners.finished_adapters import read_finished, refuse_different

        finished = [read_finished(target, adapter_folder(target), KEY) for target in self.config.adapters]
        refuse_different(finished, KEY)
        for adapter in finished:
            self._refuse_unfit(adapter, model)
        return finished

    def _refuse_unfit(self, adapter: Finished, model: PreTrainedModel) -> None:
        """Raise where an adapter does not fit this base, or trained more than adapters and a head."""
        heads = tuple(f"{name}." for name in _heads.head_names(model))
        present = dict(model.named_modules())
        other = f"{KEY}: {adapter.target} is an adapter of another base"
        for place, d in adapter.widths.items():
            if place not in present:
                raise UsageError(f"{other}: it stands at {place}, which this model does not have")
            block = adapter.config.width is not None
            wide = model.config.get_text_config().hidden_size if block else in_out_features(present[place])[1]
            if d != wide:
                raise UsageError(f"{other}: it is {d} wide at {place}, where this model is {wide}")
        for name in adapter.others:
            if name in present and not f"{name}.".startswith(heads):
                raise UsageError(
                    f"{KEY}: {adapter.target} has trained {name} too, and fused adapters can't each have their own; "
                    "train it without, with train_norms: false"
                )
