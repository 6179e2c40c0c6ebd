"""Which modules a `target_modules` value selects, with an error where it selects nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from peftctl.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Targets = str | list[str]
WORDS = ("all-linear", "attention", "mlp")
_MAMBA = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
"""Architectures whose kernel takes the weights of `out_proj` and `conv1d` and never calls these modules."""


def resolve_targets(model: PreTrainedModel, targets: Targets | None) -> Targets:
    """Return the targets to use: those given, else peft's table for the architecture.

    Raises:
        UsageError: None are given and peft knows none for the architecture.
    """
    if targets is not None:
        return targets
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    architecture = model.config.model_type
    if architecture not in KNOWN:
        raise UsageError(
            f"method.target_modules: no default is known for the architecture '{architecture}'; "
            f"give 'all-linear' or names among: {', '.join(_last_names(adaptable_modules(model)))}"
        )
    return list(KNOWN[architecture])


def matched_modules(model: PreTrainedModel, targets: Targets) -> dict[str, nn.Module]:
    """Return the modules that the targets select, by name, in the model's order.

    A list holds words and name suffixes (`q_proj`, `layers.3.mlp.up_proj`); a string is a word or a regular expression
    over the whole name. The words are `all-linear` (every linear layer but the output head), `attention` and `mlp`
    (the linear layers in the attention or the feed-forward part of every block). Embeddings are selected by name only.

    Raises:
        UsageError: The expression, or one entry of the list, selects nothing that low-rank factors can stand beside.
    """
    adaptable = adaptable_modules(model)
    if isinstance(targets, list):
        found = {name for entry in targets for name in _entry(model, adaptable, entry)}
    elif targets in WORDS:
        found = set(_word(model, adaptable, targets))
    else:
        found = set(_select(model, adaptable, targets, _whole_name(targets)))
    return {name: module for name, module in adaptable.items() if name in found}


def adaptable_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the modules that low-rank factors can stand beside: Linear, GPT-2's Conv1D and Embedding."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    embedding = model.get_input_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        # Subclasses of Embedding may look up something else than their input, as OPT's positions do.
        if (isinstance(module, nn.Linear | Conv1D) or type(module) is nn.Embedding or module is embedding)
        and _kernel(model, name) is None
    }


def in_out_features(module: nn.Module) -> tuple[int, int]:
    """Return (d_in, d_out) of a Linear, a Conv1D, whose weight is stored (d_in, d_out), or an Embedding."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return module.nx, module.nf  # type: ignore[return-value]


def suffixes(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the shortest suffixes that select exactly these modules, as other tools read them in adapter_config.json.

    A suffix ends a name at a dot, or is the whole name.
    """
    wanted = set(names)
    bearers: dict[str, set[str]] = {}
    for name, _ in model.named_modules():
        parts = name.split(".")
        for start in range(len(parts)):
            bearers.setdefault(".".join(parts[start:]), set()).add(name)
    found: set[str] = set()
    for name in wanted:
        parts = name.split(".")
        ends = (".".join(parts[start:]) for start in reversed(range(len(parts))))
        found.add(next((end for end in ends if bearers[end] <= wanted), name))
    return sorted(found)


def ends_with(name: str, suffix: str) -> bool:
    """Tell whether a module's name ends with a suffix at a dot: `norm` ends `model.norm`, not `input_layernorm`."""
    return name == suffix or name.endswith("." + suffix)


def _entry(model: PreTrainedModel, adaptable: Mapping[str, nn.Module], entry: str) -> Iterable[str]:
    """Return what one entry of a list selects."""
    if entry in WORDS:
        return _word(model, adaptable, entry)
    return _select(model, adaptable, entry, lambda name: ends_with(name, entry))


def _word(model: PreTrainedModel, adaptable: Mapping[str, nn.Module], word: str) -> list[str]:
    from torch import nn

    from peftctl.models.anatomy import linear_parts

    head = model.get_output_embeddings()
    linear = [n for n, m in adaptable.items() if m is not head and not isinstance(m, nn.Embedding)]
    found = linear if word == "all-linear" else linear_parts(model, linear)[word]
    if not found:
        experts = {type(m).__name__ for m in model.modules() for p in m.parameters(recurse=False) if p.dim() == 3}
        fused = f" (its experts lie fused in {', '.join(sorted(experts))})" if experts and word == "mlp" else ""
        raise UsageError(
            f"method.target_modules: '{word}' matches no linear layer of the {model.config.model_type} architecture"
            f"{fused}; give names among: {', '.join(_last_names(adaptable))}"
        )
    return found


def _whole_name(pattern: str) -> Callable[[str], bool]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"method.target_modules: '{pattern}' is not a regular expression: {error}") from error
    return lambda name: compiled.fullmatch(name) is not None


def _select(
    model: PreTrainedModel, adaptable: Mapping[str, nn.Module], entry: str, hits: Callable[[str], bool]
) -> list[str]:
    """Return the adaptable modules that are hit.

    Raises:
        UsageError: None is; other things may be.
    """
    found = [name for name in adaptable if hits(name)]
    if found:
        return found
    where = f"method.target_modules: '{entry}'"
    for name, module in model.named_modules():
        if name and hits(name):
            kernel = _kernel(model, name)
            why = f"inside the fused kernel of {kernel}, which never calls it" if kernel else "not a linear layer"
            raise UsageError(f"{where} is {name}, a {type(module).__name__}, {why}; {_choices(adaptable)}")
    for name, parameter in model.named_parameters():
        if hits(name):
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            raise UsageError(
                f"{where} is {name}, a tensor of {tuple(parameter.shape)} inside the fused kernel of {owner}, not a "
                f"linear layer; {_choices(adaptable)}"
            )
    raise UsageError(
        f"{where} matches no linear layer of the model; {did_you_mean(entry, [*WORDS, *_last_names(adaptable)])} "
        f"(a list holds ends of names; a string is a regular expression over whole names, or {', '.join(WORDS)})"
    )


def _kernel(model: PreTrainedModel, name: str) -> str | None:
    """Return the type of the fused kernel that uses a module's weight without calling the module, if any does."""
    from torch import nn

    parent = model.get_submodule(name.rpartition(".")[0])
    mamba = model.config.model_type in _MAMBA and name.rsplit(".", 1)[-1] in ("out_proj", "conv1d")
    return type(parent).__name__ if mamba or isinstance(parent, nn.MultiheadAttention) else None


def _choices(adaptable: Mapping[str, nn.Module]) -> str:
    return f"there are: {', '.join(_last_names(adaptable))}, and {', '.join(WORDS)}"


def _last_names(names: Iterable[str]) -> list[str]:
    """Return the last parts of names, without repeats, e.g. q_proj."""
    return sorted({name.rsplit(".", 1)[-1] for name in names})
