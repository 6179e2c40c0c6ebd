"""What a LoRA section selects on one model: ranks and rows of its layers, whole modules, rows of new tokens.

Everything here also works on the meta device, so that a recipe is refused before weights load.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftctl.errors import UsageError, did_you_mean
from peftctl.methods import _targets
from peftctl.methods._heads import head_names

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from peftctl.methods._lora import LoraKeys


@dataclass(frozen=True)
class Layer:
    """A target.

    Args:
        module: Linear, Conv1D or Embedding.
        rank: r of this layer.
        rows: The rows of d_out whose B trains; None is all.
    """

    module: nn.Module
    rank: int
    rows: Sequence[int] | None

    def count(self) -> int:
        """Return r * (d_in + d_out), where d_out counts the rows that train."""
        d_in, d_out = _targets.in_out_features(self.module)
        return self.rank * (d_in + (d_out if self.rows is None else len(self.rows)))


@dataclass(frozen=True)
class Selection:
    """What trains.

    Args:
        layers: Targets by name.
        whole: Modules that train whole, by name, none inside another; of a tied pair only the input embedding; and the
            head of a classifier.
        token_rows: Modules in which the rows of the new tokens train, by name; of a tied pair only the embedding.
        tied: The output head, where it shares the matrix of an input embedding in `whole`.
    """

    layers: Mapping[str, Layer]
    whole: Mapping[str, nn.Module]
    token_rows: Mapping[str, nn.Module]
    tied: str | None

    def count(self, new_tokens: int) -> int:
        """Return the closed-form number of trainable parameters."""
        factors = sum(layer.count() for layer in self.layers.values())
        copies = sum(p.numel() for module in self.whole.values() for p in module.parameters())
        width = sum(module.get_parameter("weight").shape[1] for module in self.token_rows.values())
        return factors + copies + new_tokens * width


def select(model: PreTrainedModel, config: LoraKeys, new_tokens: int) -> Selection:
    """Resolve the keys of a section on a model.

    Raises:
        UsageError: A key selects nothing, or two keys want the same module.
    """
    whole = _whole_modules(model, [*config.modules_to_save, *head_names(model)])
    targets = _targets.resolve_targets(model, config.target_modules)
    modules = {
        name: module
        for name, module in _targets.matched_modules(model, targets).items()
        if not any(_inside(name, saved) for saved in whole)
    }
    if not modules:
        raise UsageError("method.modules_to_save: holds every target of method.target_modules; leave some to LoRA")
    ranks = _by_pattern("rank_pattern", config.rank_pattern, modules)
    _by_pattern("alpha_pattern", config.alpha_pattern, modules)
    rows = _chosen_rows(model, modules, config.parts)
    layers = {
        name: Layer(m, config.rank_pattern.get(ranks[name], config.r), rows.get(name)) for name, m in modules.items()
    }
    token_rows = _token_rows(model, modules, whole) if new_tokens else {}
    tied = model.get_input_embeddings() in whole.values()
    return Selection(layers, whole, token_rows, tied_head(model) if tied else None)


def tied_head(model: PreTrainedModel) -> str | None:
    """Return the name of the output head where it shares the input embedding's matrix."""
    head = model.get_output_embeddings()
    if head is None or head.weight is not model.get_input_embeddings().weight:
        return None
    return name_of(model, head)


def name_of(model: nn.Module, module: nn.Module) -> str:
    """Return the name of a module of the model."""
    return next(name for name, other in model.named_modules() if other is module)


def _inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(outer + ".")


def _whole_modules(model: PreTrainedModel, entries: Sequence[str]) -> dict[str, nn.Module]:
    """Return the modules that train whole, the outermost ones, with a tied head standing for its embedding."""
    modules = {name: module for name, module in model.named_modules() if name}
    names: set[str] = set()
    for entry in entries:
        hits = {name for name in modules if _targets.ends_with(name, entry)}
        if not hits:
            leaves = {name.rsplit(".", 1)[-1] for name in modules} - {"0"}
            raise UsageError(
                f"method.modules_to_save: '{entry}' matches no module; "
                f"{did_you_mean(entry, (leaf for leaf in leaves if not leaf.isdigit()))}"
            )
        names |= hits
    _refuse_unsavable(modules, names)
    head, embedding = tied_head(model), name_of(model, model.get_input_embeddings())
    if head in names:
        names = (names - {head}) | {embedding}
    if head is not None and embedding in names and not _peft_ties(head, embedding):
        raise UsageError(
            f"method.modules_to_save: {embedding} is tied to {head}, and peft keeps that only for embed_tokens and "
            "lm_head; take another module, or method full"
        )
    names = {name for name in names if not any(name != other and _inside(name, other) for other in names)}
    refuse_look_alikes("method.modules_to_save", modules, names)
    return {name: modules[name] for name in modules if name in names}


def _peft_ties(head: str, embedding: str) -> bool:
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    return any(name.rsplit(".", 1)[-1] in EMBEDDING_LAYER_NAMES for name in (head, embedding))


def _refuse_unsavable(modules: Mapping[str, nn.Module], names: Iterable[str]) -> None:
    from torch import nn

    for name in sorted(names):
        module = modules[name]
        where = f"method.modules_to_save: {name} is a {type(module).__name__}"
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            raise UsageError(f"{where}, a list of modules; name the modules in it")
        if not any(True for _ in module.parameters()):
            raise UsageError(f"{where}, which has no parameters to train")
        if not all(p.is_floating_point() for p in module.parameters()):
            raise UsageError(f"{where} with quantised weights, which can't train; leave it to LoRA")


def refuse_look_alikes(where: str, modules: Iterable[str], names: Iterable[str]) -> None:
    """Raise where peft, which compares ends of names without regard to dots, would take further modules too.

    Raises:
        UsageError: It would.
    """
    wanted = set(names)
    for name in modules:
        if name not in wanted and (taken := next((w for w in wanted if name.endswith(w)), None)):
            raise UsageError(f"{where}: peft can't tell {taken} from {name} in this architecture; choose another")


def _by_pattern(key: str, patterns: Mapping[str, float], names: Iterable[str]) -> dict[str, str]:
    """Return which pattern rules each layer, as peft finds it: the first that ends the name at a dot, else none ('').

    Raises:
        UsageError: A pattern rules no layer.
    """
    from peft.utils.other import get_pattern_key

    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"method.{key}: '{pattern}' is not a regular expression: {error}") from error
    names = list(names)
    found = {name: get_pattern_key(list(patterns), name) for name in names}
    for pattern in patterns:
        if pattern in found.values():
            continue
        if any(get_pattern_key([pattern], name) == pattern for name in names):
            raise UsageError(f"method.{key}: '{pattern}' is never reached, patterns above it match first; move it up")
        leaves = {name.rsplit(".", 1)[-1] for name in names}
        raise UsageError(
            f"method.{key}: '{pattern}' matches no target; {did_you_mean(pattern, leaves)} (a pattern is the end of a "
            "name, or a regular expression for it)"
        )
    return {name: pattern if pattern in patterns else "" for name, pattern in found.items()}


def _chosen_rows(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], parts: Sequence[str]
) -> dict[str, Sequence[int]]:
    """Return the rows of each fused target that belong to the chosen parts.

    Raises:
        UsageError: No target is fused, a part is in none of them, or a fused target has none of the parts.
    """
    from peftctl.models.anatomy import fused_parts

    if not parts:
        return {}
    layouts = {}
    for name, module in modules.items():
        layout = fused_parts(model.config, name, _targets.in_out_features(module)[1])
        if layout is not None:
            layouts[name] = layout
    if not layouts:
        raise UsageError(
            f"method.parts: no target is a fused projection whose parts are known for the {model.config.model_type} "
            "architecture; name the projections in method.target_modules, as q_proj and v_proj"
        )
    known = {part for layout in layouts.values() for part in layout}
    for part in parts:
        if part not in known:
            raise UsageError(f"method.parts: no fused target has a part '{part}'; {did_you_mean(part, known)}")
    for name, layout in layouts.items():
        if not layout.keys() & set(parts):
            raise UsageError(
                f"method.parts: {name} has the parts {', '.join(layout)}, and none of them is named; name one, or "
                "leave it out of method.target_modules"
            )
    return {name: sorted(row for part in parts for row in layout.get(part, ())) for name, layout in layouts.items()}


def _token_rows(model: PreTrainedModel, targets: Iterable[str], whole: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules in which rows of new tokens train beside a frozen rest.

    Raises:
        UsageError: They can't, because of the architecture or of another key.
    """
    if model.config.is_encoder_decoder:
        raise UsageError("model.add_tokens: rows of new tokens don't train in encoder-decoders; use method full")
    embedding, head, tie = model.get_input_embeddings(), model.get_output_embeddings(), tied_head(model)
    ends = {name_of(model, embedding): embedding}
    if head is not None and tie is None:
        ends[name_of(model, head)] = head
    for name in (*ends, *([tie] if tie else [])):
        if name in targets:
            raise UsageError(
                f"method.target_modules: {name} can't get a low-rank update and rows of new tokens at once; leave it "
                "out"
            )
    if head is not None and head.bias is not None and head not in whole.values():
        raise UsageError(
            "model.add_tokens: the output head of this architecture has a bias, which peft drops where rows of new "
            f"tokens train; add {name_of(model, head)} to method.modules_to_save"
        )
    found = {name: end for name, end in ends.items() if not any(_inside(name, saved) for saved in whole)}
    refuse_look_alikes("model.add_tokens", (name for name, _ in model.named_modules()), found)
    return found
