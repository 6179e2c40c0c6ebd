"""Any adapter type of the installed peft, by its own config: `method: {name: peft, type: HIRA, config: {r: 32}}`.

`type` and `config` are what peft writes to adapter_config.json, and peft's documentation of the type says what they
mean (https://huggingface.co/docs/peft). A type that peftctl has a method of its own for is better used through that:
the library's defaults are often not the paper's.

What trains is counted, not computed by a formula: the type is attached to a copy of the model that has shapes and no
values. Types and settings that need more than a forward and a backward pass are refused: schedules, numbers of tasks,
adapters trained before, a base that is changed in place. The head of a classifier trains beside the adapter.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from peftctl.errors import UsageError, did_you_mean
from peftctl.methods import _targets, base
from peftctl.methods._lora import TASK_TYPES

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from peftctl.models.supervised import Supervised

_OURS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
    "runtime_config", "task_type",
}  # fmt: skip
"""Fields of every config that follow from the rest of the recipe."""

_REFUSED = {
    "ADALORA": "its schedule belongs to the training loop; take method.name: adalora",
    "MULTITASK_PROMPT_TUNING": "it needs a task number with every row; take method.name: multitask_prompt_tuning",
    "POLY": "it needs a task number with every row",
    "XLORA": "it mixes adapters that are trained already",
}
"""Types that need more than peft and a recipe give them."""

_OTHER_BASE = "it changes the base, or looks at data, before training; methods pissa, olora and lora do without"
_REFUSED_KEYS = {
    "ADAMSS": {"use_asa": "its schedule belongs to the training loop"},
    "CPT": {"opt_weighted_loss_type": "it is a loss that peft computes, and peftctl computes its own"},
    "LORA": {
        "arrow_config": "it routes between adapters that are trained already",
        "corda_config": _OTHER_BASE,
        "eva_config": _OTHER_BASE,
        "kasa_config": _OTHER_BASE,
        "layer_replication": "it makes another base of more layers",
        "loftq_config": _OTHER_BASE,
        "lora_ga_config": _OTHER_BASE,
        "monteclora_config": "it is a loss that peft computes, and peftctl computes its own",
    },
    "PROMPT_TUNING": {"prompt_tuning_init_text": "take method.name: prompt_tuning, which starts from text"},
}
"""Type -> settings that need more, unless they are off, with the reason."""

_PLAIN_INITS = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that draw A and B and touch nothing else."""

_CACHES = ("PREFIX_TUNING", "CARTRIDGE")
"""Types whose prompt is a cache of keys and values, which recomputed blocks do not get."""

_NOTES = {
    "PSOFT": "PSOFT saves no frozen factors: whoever loads it decomposes the base again, and another machine may find "
    "other signs; merge it on the machine that trained it"
}

_NOISE = ("fan_in_fan_out is set", "Failed to load the CUDA extension", "Unsupported layer type")
"""How warnings of peft begin that a user can do nothing about."""


class Config(base.MethodConfig):
    """The `method:` section of the generic method."""

    name: Literal["peft"] = "peft"
    type: str
    """A type of the installed peft, as adapter_config.json has it in `peft_type`, e.g. HIRA."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of the type's own config; left out, peft's defaults. `target_modules` also takes `attention` and `mlp`."""


class Method(base.Method):
    """One adapter type of the installed peft."""

    Config = Config
    card = base.Card(
        title="Any type of peft",
        paper="the type's own: see peft's documentation of it",
        category="adapter",
        summary="Every adapter type of the installed peft that trains by a plain loop, by the config peft documents.",
        trains="what peft trains of the type, and a classifier's head",
        count="counted from the shapes, on a copy of the model without values",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        mergeable=True,
        merge_note="prompts, ADAPTION_PROMPT, LILY and SHADOW can't be: merge says so",
        identity_note="HIRA and most others; not prompts, C3A, FOURIERFT, UNILORA and VBLORA",
        needs="ADAMSS needs scikit-learn. Prompt types do causal_lm only.",
        supports=frozenset({"gradient_checkpointing", "resume", "4bit", "8bit"}),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return how many parameters train, counted on a copy of the model without values."""
        with warnings.catch_warnings(action="ignore"):  # `notices` has them
            attached = _attach_to_shapes(model, self._settings(model))
        return sum(p.numel() for p in attached.parameters() if p.requires_grad)

    def notices(self, model: PreTrainedModel) -> Sequence[str]:
        """Return the targets that peft chose, what it warns of, and what is known of the type."""
        from peftctl.methods import registry

        kind = self.config.type
        with warnings.catch_warnings(record=True, action="always") as warned:
            attached = _attach_to_shapes(model, self._settings(model))
        chosen = vars(attached.peft_config["default"]).get("target_modules")
        lines = [_NOTES[kind]] if kind in _NOTES else []
        if chosen and "target_modules" not in self.config.config:
            names = chosen if isinstance(chosen, str) else ", ".join(sorted(chosen))
            lines.append(f"target_modules: {names} (peft's choice)")
        if kind.lower() in registry.names():
            lines.append(f"{kind}: method.name: {kind.lower()} has the paper's settings")
        own = [w for w in warned if w.category in (UserWarning, RuntimeWarning)]
        said = dict.fromkeys(" ".join(str(warning.message).split()) for warning in own)
        return [*lines, *(f"peft: {line}" for line in said if not line.startswith(_NOISE))]

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach the adapter.

        Raises:
            UsageError: There is no such type or setting, peft refuses a value, or the recipe asks for what the type
                can't do.
        """
        from peftctl.tuners.float32_copy import widen_copies

        settings, recipe = self._settings(model), context.recipe
        _refuse_combination(settings, recipe.quantization.bits, recipe.train.gradient_checkpointing)
        with warnings.catch_warnings(action="ignore"):  # `notices` has them
            on_shapes = model.device.type == "meta"
            attached = _attach_to_shapes(model, settings).to("meta") if on_shapes else _attach(model, settings)
        widen_copies(attached)
        _refuse_narrow(attached, self.config.type)
        return attached

    def loss(
        self, model: Any, batch: Mapping[str, torch.Tensor], forward: Callable[..., Supervised]
    ) -> dict[str, torch.Tensor]:
        """Return the cross-entropy, and for SHADOW that of the small network alone."""
        parts = super().loss(model, batch, forward)
        if self.config.type == "SHADOW" and (weight := model.peft_config["default"].auxiliary_loss_weight):
            mask = batch["attention_mask"]
            parts["shadow"] = weight * model.base_model.shadow_auxiliary_loss(batch["labels"], mask)
        return parts

    def state_dict(self, model: Any) -> dict[str, Any]:
        """Return the adapter's tensors that were drawn and do not train, e.g. shared projections."""
        if model.peft_config["default"].is_prompt_learning:
            return {n: p.detach() for n, p in model.prompt_encoder.named_parameters() if not p.requires_grad}
        from peft import get_peft_model_state_dict

        trained = {p.data_ptr() for p in model.parameters() if p.requires_grad}
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        return {name: tensor for name, tensor in tensors.items() if tensor.data_ptr() not in trained}

    def load_state_dict(self, model: Any, state: Mapping[str, Any]) -> None:
        """Restore them."""
        from peft import set_peft_model_state_dict

        if model.peft_config["default"].is_prompt_learning:
            model.prompt_encoder.load_state_dict(state, strict=False)
        elif state:
            set_peft_model_state_dict(model, dict(state))

    def export(self, model: Any) -> Any:
        """Return the adapter, with whole modules in the base's type, as peft loads them."""
        from peftctl.tuners.float32_copy import narrow_copies

        narrow_copies(model)
        return model

    def _settings(self, model: PreTrainedModel) -> Any:
        """Return peft's config of the section."""
        from peftctl.methods._heads import unknown_to_peft

        kind, values = self.config.type, copy.deepcopy(self.config.config)
        cls = _config_class(kind)
        _refuse_keys(kind, cls, values)
        task, names = _task(model), {field.name for field in fields(cls)}
        if "num_virtual_tokens" in names and task != "causal_lm":
            raise UsageError(f"method.type: {kind} does causal_lm here; for {task} take a prompt method of peftctl")
        if task in ("seq_cls", "token_cls"):
            if "modules_to_save" not in names:
                raise UsageError(f"method.type: peft can't train a classifier's head beside {kind}; take another type")
            values["modules_to_save"] = [*(values.get("modules_to_save") or []), *unknown_to_peft(model)] or None
        if "target_modules" in values:
            values["target_modules"] = _resolved(model, values["target_modules"])
        with _explained(kind):
            return cls(task_type=TASK_TYPES[task], **values)


def _task(model: PreTrainedModel) -> str:
    from peftctl.models.classifier import classification_task

    language = "seq2seq_lm" if model.config.is_encoder_decoder else "causal_lm"
    return classification_task(model) or language


def _config_class(kind: str) -> Any:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    # Without the types that peftctl adds to the mapping.
    types = {known.value: PEFT_TYPE_TO_CONFIG_MAPPING[known] for known in PeftType}
    if kind not in types:
        raise UsageError(f"method.type: the installed peft has no '{kind}'; {did_you_mean(kind.upper(), types)}")
    if kind in _REFUSED:
        raise UsageError(f"method.type: {kind} can't train by its config alone: {_REFUSED[kind]}")
    return types[kind]


def _refuse_keys(kind: str, cls: Any, values: Mapping[str, Any]) -> None:
    known = {field.name for field in fields(cls) if field.init} - _OURS
    reasons = _REFUSED_KEYS.get(kind, {})
    for key, value in values.items():
        where = f"method.config.{key}"
        if key in _OURS:
            raise UsageError(f"{where}: follows from the rest of the recipe; remove it")
        if key not in known:
            raise UsageError(f"{where}: not a setting of {kind}; {did_you_mean(key, known)}")
        if key in reasons and value not in (None, False, "none", {}):
            raise UsageError(f"{where}: {reasons[key]}; remove it")
    if kind == "LORA" and values.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise UsageError(f"method.config.init_lora_weights: {values['init_lora_weights']}: {_OTHER_BASE}")
    if "num_virtual_tokens" in known and kind != "CPT" and "num_virtual_tokens" not in values:
        raise UsageError(f"method.config.num_virtual_tokens: {kind} needs it: how many tokens the prompt has")


def _resolved(model: PreTrainedModel, targets: Any) -> Any:
    """Return targets with our words replaced by names; a list's other entries must each end a module's name."""
    from peftctl.methods._heads import head_names

    entries = [targets] if isinstance(targets, str) and targets in _targets.WORDS else targets
    if not isinstance(entries, list):
        return entries
    heads = tuple(f"{name}." for name in head_names(model))
    found = []
    for entry in entries:
        if entry in _targets.WORDS:
            chosen = (n for n in _targets.matched_modules(model, [entry]) if not f"{n}.".startswith(heads))
            found += _targets.suffixes(model, chosen)
        elif any(_targets.ends_with(name, str(entry)) for name, _ in model.named_modules()):
            found.append(entry)
        else:
            names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
            near = did_you_mean(str(entry), [*_targets.WORDS, *(n for n in names if n and not n.isdigit())])
            raise UsageError(f"method.config.target_modules: '{entry}' matches no module of the model; {near}")
    return found


def _refuse_combination(settings: Any, bits: int | None, recompute: bool | None) -> None:
    kind = str.__str__(settings.peft_type)
    if recompute and kind in _CACHES:
        raise UsageError(f"train.gradient_checkpointing: {kind} hands a cache to the model; remove it")
    package = type(settings).__module__.rpartition(".")[0]
    if bits and not settings.is_prompt_learning and find_spec(f"{package}.bnb") is None:
        raise UsageError(f"quantization.bits: peft has no {kind} for a base of {bits} bits; remove `quantization:`")


def _refuse_narrow(model: Any, kind: str) -> None:
    import torch

    narrow = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    if narrow:
        dtype = str(narrow.pop()).removeprefix("torch.")
        raise UsageError(
            f"model.dtype: peft trains {kind} in the base's type, and {dtype} rounds small updates away; set float32"
        )


def _attach(model: Any, settings: Any) -> Any:
    from peft import get_peft_model

    with _explained(str.__str__(settings.peft_type)):
        return get_peft_model(model, settings)


def _attach_to_shapes(model: Any, settings: Any) -> Any:
    """Attach to a copy without values; on the CPU for the few types that compute with values as they are made."""
    import torch

    try:
        with torch.device("meta"):
            return _attach(_without_values(model, "meta"), copy.deepcopy(settings))
    except UsageError as error:
        if not isinstance(error.__cause__, RuntimeError):
            raise
    return _attach(_without_values(model, "cpu"), settings)


def _without_values(model: nn.Module, device: str) -> Any:
    """Copy a model but not its weights: on the CPU one zero stands for all of them. Quantised ones are shared."""
    import torch

    hollow: dict[int, Any] = {}
    for p in model.parameters():
        zero = torch.zeros((), dtype=p.dtype, device=device)
        hollow[id(p)] = torch.nn.Parameter(zero.expand(p.shape), False) if p.is_floating_point() else p
    for buffer in model.buffers():
        hollow[id(buffer)] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
    return copy.deepcopy(model, hollow)


@contextmanager
def _explained(kind: str) -> Iterator[None]:
    """Turn what peft raises of a config, which can be anything, into one line."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"method.config: {kind}: {reason}") from error
