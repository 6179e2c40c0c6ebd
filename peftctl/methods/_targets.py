"""Which modules a `target_modules` value selects, with an error where it selects nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from peftctl.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Targets = str | list[str]


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
            f"give 'all-linear' or names among: {', '.join(linear_leaf_names(model))}"
        )
    return list(KNOWN[architecture])


def matched_modules(model: PreTrainedModel, targets: Targets) -> dict[str, nn.Module]:
    """Return the modules that the targets select, by name.

    A list holds name suffixes (`q_proj`, `layers.3.mlp.up_proj`); a string is `all-linear` (every linear layer but
    the output head) or a regular expression over the whole name.

    Raises:
        UsageError: The expression, or one entry of the list, selects nothing.
    """
    linear = dict(linear_modules(model))
    if targets == "all-linear":
        head = model.get_output_embeddings()
        return {name: module for name, module in linear.items() if module is not head}
    if isinstance(targets, str):
        return _by_pattern(linear, targets)
    found: dict[str, nn.Module] = {}
    for entry in targets:
        hits = {name: m for name, m in linear.items() if name == entry or name.endswith("." + entry)}
        if not hits:
            raise _nothing(entry, linear)
        found |= hits
    return {name: module for name, module in linear.items() if name in found}


def linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that low-rank factors can be attached to: Linear and GPT-2's Conv1D."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


def linear_leaf_names(model: nn.Module) -> list[str]:
    """Return the last parts of the linear layers' names, without repeats, e.g. q_proj."""
    return sorted({name.rsplit(".", 1)[-1] for name, _ in linear_modules(model)})


def in_out_features(module: nn.Module) -> tuple[int, int]:
    """Return (d_in, d_out) of a Linear or a Conv1D, whose weight is stored (d_in, d_out)."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.nx, module.nf  # type: ignore[return-value]


def _by_pattern(linear: dict[str, nn.Module], pattern: str) -> dict[str, nn.Module]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"method.target_modules: '{pattern}' is not a regular expression: {error}") from error
    found = {name: module for name, module in linear.items() if compiled.fullmatch(name)}
    if not found:
        raise _nothing(pattern, linear)
    return found


def _nothing(entry: str, linear: dict[str, nn.Module]) -> UsageError:
    leaves = sorted({name.rsplit(".", 1)[-1] for name in linear})
    return UsageError(
        f"method.target_modules: '{entry}' matches no linear layer of the model; {did_you_mean(entry, leaves)} "
        f"(there are: {', '.join(leaves)}; a string is a regular expression over whole names, or all-linear)"
    )
