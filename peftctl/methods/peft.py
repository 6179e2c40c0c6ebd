"""Any adapter type of the installed peft, by its own config: `method: {name: peft, type: HIRA, config: {r: 32}}`.

`type` and `config` are what peft writes into adapter_config.json, and what they mean is in peft's documentation of the
type (https://huggingface.co/docs/peft). Nothing here is about one paper: a type that has a method of its own in
peftctl is better used through that, since peft's defaults are often not the paper's.

What trains is counted, not computed by a formula: the type is attached to a copy of the model that has shapes and no
values. Refused are types and settings that need more than a forward and a backward pass: schedules, numbers of tasks,
losses of their own, other adapters, a base that is changed in place. The classification head trains with the adapter.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from pydantic import Field

from peftctl.errors import UsageError, did_you_mean
from peftctl.methods import _targets, base
from peftctl.methods._lora import TASK_TYPES

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

_OURS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
        "runtime_config", "task_type",
    }
)  # fmt: skip
"""Fields of every config that follow from the rest of the recipe."""

_OWN_METHOD = {"ADALORA": "adalora", "MULTITASK_PROMPT_TUNING": "multitask_prompt_tuning"}
"""Types that need more of the training loop, which these methods give them."""

_REFUSED = {
    "POLY": "it needs the number of its task with every row",
    "XLORA": "it mixes adapters that are trained already",
}

_PROMPTS_IN_CACHE = ("PREFIX_TUNING", "CARTRIDGE")
"""Types whose prompt is a cache of keys and values, which checkpointed blocks can't read."""


class Config(base.MethodConfig):
    """The `method:` section of the generic method."""

    name: Literal["peft"] = "peft"
    type: str
    """A type of the installed peft, as adapter_config.json names it in `peft_type`, e.g. HIRA."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of the type's config; left out, peft's defaults. `target_modules` also takes `attention` and `mlp`."""


class Method(base.Method):
    """One adapter type of the installed peft."""

    Config = Config
    card = base.Card(
        title="Any peft type",
        paper="the type's own; see peft's documentation of it",
        category="adapter",
        summary="Every adapter type of the installed peft, by the config that peft itself documents.",
        trains="what peft trains of the type",
        count="counted from the shapes: the type is attached to a copy of the model without values",
        tasks=("causal_lm", "seq2seq_lm"),
        mergeable=True,
        merge_note="prompts, ADAPTION_PROMPT, LILY and SHADOW can't be; merge says so",
        identity_at_init=False,
        identity_note="as the type has it: most start as the base, prompts and FOURIERFT do not",
        needs="some types need a package of their own, e.g. ADAMSS scikit-learn; the message names it",
        supports=frozenset({"gradient_checkpointing", "resume"}),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return how many parameters train, counted on a copy of the model without values."""
        attached = _attach_to_shapes(model, self._settings(model, "causal_lm"))
        return sum(p.numel() for p in attached.parameters() if p.requires_grad)

    def notices(self, model: PreTrainedModel) -> Sequence[str]:
        """Return the targets that peft chose."""
        return ()

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach the adapter."""
        settings = self._settings(model, context.recipe.model.task)
        if model.device.type == "meta":
            return _attach_to_shapes(model, settings)
        return _attach(model, settings)

    def _settings(self, model: PreTrainedModel, task: str) -> Any:
        cls = _config_class(self.config.type)
        known = {field.name for field in fields(cls)} - _OURS
        for key, value in self.config.config.items():
            if key in _OURS:
                raise UsageError(f"method.config.{key}: follows from the recipe; remove it")
            if key not in known:
                raise UsageError(f"method.config.{key}: not a setting of {self.config.type}; {did_you_mean(key, known)}")
        values = copy.deepcopy(self.config.config)
        with _explained(self.config.type):
            return cls(task_type=TASK_TYPES[task], **values)


def _config_class(name: str) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as KNOWN

    types = {str.__str__(key): cls for key, cls in KNOWN.items()}
    if name not in types:
        raise UsageError(f"method.type: the installed peft has no '{name}'; {did_you_mean(name, types)}")
    return types[name]


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"method.config: {name}: {reason}") from error


def _attach(model: Any, settings: Any) -> Any:
    from peft import get_peft_model

    with _explained(settings.peft_type), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        return get_peft_model(model, settings)


def _attach_to_shapes(model: Any, settings: Any) -> Any:
    import torch
    from peft import get_peft_model

    try:
        with torch.device("meta"):
            return get_peft_model(_without_values(model, "meta"), copy.deepcopy(settings))
    except RuntimeError:
        return _attach(_without_values(model, "cpu"), settings).to("meta")


def _without_values(model: nn.Module, device: str) -> Any:
    import torch
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = torch.nn.Parameter(torch.zeros((), dtype=p.dtype, device=device).expand(p.shape), requires_grad=False)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta") if device == "meta" else (b if not b.is_meta else torch.zeros(b.shape, dtype=b.dtype))
    return copy.deepcopy(model, memo)
