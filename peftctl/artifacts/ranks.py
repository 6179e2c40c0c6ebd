"""What an adapter adds to each module: rank, alpha, scale and parameters; from its configuration and tensor shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import nn

from peftctl.artifacts import manifest as manifests
from peftctl.artifacts.checks import ADAPTER_WEIGHTS, read_keys
from peftctl.artifacts.locate import ADAPTER_CONFIG
from peftctl.errors import ArtifactError
from peftctl.models.outline import collapse

Shape = tuple[int, ...]

_PREFIX = "base_model.model."
_LOW_RANK = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[ABE]|lora_magnitude_vector)(?:\.(?:weight|bias))?"
)


@dataclass(frozen=True)
class Adapted:
    """What is trained at one module, or at several of equal figures.

    Args:
        name: Of the module in the base model, with block numbers as `{0..3}`; of the tensor where it is not low-rank.
        shape: Of the module's weight, (d_out, d_in), for a low-rank update; else of the trained tensor.
        r: Rank; None where the update is not a low-rank one.
        alpha: lora_alpha.
        scale: What B A is multiplied by: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.
        parameters: Trained here.
        count: Modules that the row stands for.
    """

    name: str
    shape: Shape
    r: int | None
    alpha: float | None
    scale: float | None
    parameters: int
    count: int = 1


def of_folder(folder: Path) -> list[Adapted]:
    """Return what an adapter directory holds, without its base and without reading a weight.

    Raises:
        ArtifactError: Its files are damaged, or do not belong together.
    """
    file = folder / ADAPTER_WEIGHTS
    names = sorted(read_keys(file))
    with safe_open(file, framework="pt") as tensors:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    return _of_tensors(manifests.read_json(folder / ADAPTER_CONFIG), shapes, str(file))


def peft_type(folder: Path) -> str:
    """Return peft's name of an adapter's kind, in lower case."""
    return str(manifests.read_json(folder / ADAPTER_CONFIG).get("peft_type", "unknown")).lower()


def virtual_tokens(folder: Path) -> Literal["tokens", "prefix"] | None:
    """Return what the virtual tokens of an adapter are: embeddings, or keys and values; None where it has none."""
    config = manifests.read_json(folder / ADAPTER_CONFIG)
    if not config.get("num_virtual_tokens"):
        return None
    return "prefix" if config.get("peft_type") == "PREFIX_TUNING" else "tokens"


def of_model(model: Any) -> list[Adapted]:
    """Return what trains in a model that a method was applied to; it may be on the meta device."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    adapted: list[Adapted] = []
    counted: set[int] = set()
    if isinstance(model, PeftModel):
        config = model.active_peft_config.to_dict()
        for name, layer in model.get_base_model().named_modules():
            if isinstance(layer, LoraLayer) and isinstance(layer, nn.Module):
                own = {id(p): p.numel() for p in layer.parameters() if p.requires_grad}
                counted |= own.keys()
                r, alpha = layer.r["default"], float(layer.lora_alpha["default"])
                shape: Any = (layer.out_features, layer.in_features)
                shape = shape[::-1] if layer.lora_embedding_A else shape
                adapted.append(Adapted(name, shape, r, alpha, _scale(alpha, r, config), sum(own.values())))
    adapter = re.compile(r"\.(modules_to_save\.)?default(?=\.|$)")
    rest = [
        Adapted(adapter.sub("", name.removeprefix(_PREFIX)), tuple(p.shape), None, None, None, p.numel())
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in counted
    ]
    return _grouped(adapted) + _grouped(rest)


def _of_tensors(config: Mapping[str, Any], shapes: Mapping[str, Shape], source: str) -> list[Adapted]:
    """Return the rows of an adapter from its tensors' shapes, by their names in the file."""
    modules: dict[str, dict[str, list[Shape]]] = {}
    rest: list[Adapted] = []
    for name, shape in shapes.items():
        plain = name.removeprefix(_PREFIX)
        match = _LOW_RANK.fullmatch(plain)
        if match is None:
            rest.append(Adapted(plain, shape, None, None, None, math.prod(shape)))
        else:
            modules.setdefault(match["module"], {}).setdefault(match["part"], []).append(shape)
    adapted = [_low_rank(module, parts, config, source) for module, parts in modules.items()]
    return _grouped(sorted(adapted, key=_order)) + _grouped(sorted(rest, key=_order))


def _low_rank(module: str, parts: Mapping[str, list[Shape]], config: Mapping[str, Any], source: str) -> Adapted:
    """Return the row of a module from A: (r, d_in) and B: (d_out, r); an embedding's are (r, tokens) and (d, r)."""
    parameters = sum(math.prod(shape) for shapes in parts.values() for shape in shapes)
    embedding = "lora_embedding_A" in parts
    try:
        a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        (rank, d_in), (d_out, _) = (next(s for s in parts[part] if len(s) == 2) for part in (a, b))
    except (KeyError, StopIteration) as error:
        raise ArtifactError(
            f"{source}: {module} lacks one of its two low-rank factors; write or fetch it again"
        ) from error
    shape = (d_in, d_out) if embedding else (d_out, d_in)
    adaptive = config["peft_type"] == "ADALORA"  # ranks are found in training, and stand in the shapes alone
    wanted = rank if adaptive else _of_pattern(config, "rank_pattern", "r", module)
    if not adaptive and (rank < wanted or rank % wanted):
        raise ArtifactError(
            f"{source}: the low-rank tensors of {module} have rank {rank}, {ADAPTER_CONFIG} says {wanted}; "
            "the two files do not belong together"
        )
    alpha = float(_of_pattern(config, "alpha_pattern", "lora_alpha", module))
    return Adapted(module, shape, wanted, alpha, _scale(alpha, wanted, config), parameters)


def _scale(alpha: float, r: int, config: Mapping[str, Any]) -> float:
    """Return what B A is multiplied by; a layer that AdaLoRA pruned away has rank 0."""
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r) if r else 0.0


def _of_pattern(config: Mapping[str, Any], patterns: str, default: str, module: str) -> Any:
    known = config.get(patterns) or {}
    return known.get(get_pattern_key(list(known), module), config[default])


def _grouped(items: list[Adapted]) -> list[Adapted]:
    """Merge rows that differ in a block number alone."""
    equal: dict[tuple[Any, ...], list[str]] = {}
    for item in items:
        equal.setdefault((item.shape, item.r, item.alpha, item.scale, item.parameters), []).append(item.name)
    shown: dict[str, str] = {}
    for names in equal.values():
        shown |= collapse(names)
    merged: dict[str, list[Adapted]] = {}
    for item in items:
        merged.setdefault(shown[item.name], []).append(item)
    return [
        replace(group[0], name=name, count=len(group), parameters=sum(item.parameters for item in group))
        for name, group in merged.items()
    ]


def _order(item: Adapted) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in item.name.split(".")]
