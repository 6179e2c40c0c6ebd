"""Finished bottleneck adapters as other runs wrote them: what they are, and their tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from peftctl.errors import ArtifactError, UsageError
from peftctl.tuners.bottleneck import BottleneckConfig, BottleneckLayer
from peftctl.tuners.fused_perceptrons import FusedPerceptrons

_PREFIX = "base_model.model."
_ADAPTER = ".bottleneck_adapter."
_SHAPE = ("placement", "reads", "width", "scaling")
"""Settings that adapters at one place must share."""


@dataclass(frozen=True)
class Finished:
    """An adapter on disk.

    Args:
        target: As the recipe names it.
        folder: Where its files are.
        config: Its settings.
        widths: Name of every module that has an adapter -> d.
        others: Names of the modules that trained whole beside them, such as norms and heads.
        sha256: Of its tensors, hex.
    """

    target: str
    folder: Path
    config: BottleneckConfig
    widths: Mapping[str, int]
    others: Sequence[str]
    sha256: str

    @property
    def label(self) -> str:
        """What it is called outside of this machine: the name of its run or folder."""
        path = Path(self.target).absolute()
        return path.parent.name if path.name == "adapter" else path.name


def read_finished(target: str, folder: Path, key: str) -> Finished:
    """Read what an adapter is, from its settings and the headers of its tensors.

    Args:
        target: The run, as the recipe names it.
        folder: Of its adapter.
        key: Of the recipe, for messages.

    Raises:
        UsageError: There is none, or none of plain perceptrons.
        ArtifactError: Its files are damaged.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise UsageError(f"{key}: {target}: expected a finished run or an adapter directory, got none; train it first")
    config = _config(target, folder, key)
    file = folder / SAFETENSORS_WEIGHTS_NAME
    widths: dict[str, int] = {}
    others = set()
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dictionary
                place, inside, part = name.removeprefix(_PREFIX).partition(_ADAPTER)
                if inside and part == "up.bias":
                    widths[place] = tensors.get_slice(name).get_shape()[0]
                elif not inside:
                    others.add(place.rpartition(".")[0])
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file}: is damaged or cut off ({error})") from error
    return Finished(target, folder, config, widths, sorted(others), digest)


def refuse_different(adapters: Sequence[Finished], key: str) -> None:
    """Raise where adapters do not stand at the same places in the same way; m and φ may differ.

    Raises:
        UsageError: A setting, the targets or a width differs.
    """
    first, *others = adapters
    for other in others:
        for name in _SHAPE:
            mine, theirs = getattr(first.config, name), getattr(other.config, name)
            if mine != theirs:
                raise UsageError(
                    f"{key}: {first.target} has {name} {mine}, {other.target} {theirs}; they must be equal"
                )
        if first.widths != other.widths:
            differing = sorted(first.widths.items() ^ other.widths.items())
            raise UsageError(
                f"{key}: {first.target} and {other.target} stand at different places, e.g. {differing[0][0]}; "
                "fuse adapters of the same method and targets"
            )


def fill(model: PeftModel, adapters: Sequence[Finished]) -> None:
    """Copy finished adapters into a model whose fusion is attached, made for their places, widths, m and φ.

    Raises:
        ArtifactError: A tensor can't be read, or is not of the shape that the settings say.
    """
    layers = dict(model.get_base_model().named_modules())
    for i, adapter in enumerate(adapters):
        file = adapter.folder / SAFETENSORS_WEIGHTS_NAME
        try:
            with safe_open(file, framework="pt") as tensors:
                for place in adapter.widths:
                    layer = layers[place]
                    assert isinstance(layer, BottleneckLayer)
                    fused = layer.bottleneck_adapter["default"]
                    assert isinstance(fused, FusedPerceptrons)
                    for part, parameter in fused.adapters[i].named_parameters():
                        parameter.data.copy_(tensors.get_tensor(f"{_PREFIX}{place}{_ADAPTER}{part}"))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ArtifactError(f"{file}: is damaged or cut off ({error})") from error


def _config(target: str, folder: Path, key: str) -> BottleneckConfig:
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, ValueError, TypeError) as error:
        raise ArtifactError(f"{target}: {CONFIG_NAME} is not one that peft reads ({error})") from error
    if not isinstance(config, BottleneckConfig) or config.kind != "plain":
        kind = config.kind if isinstance(config, BottleneckConfig) else str(config.peft_type).rpartition(".")[2]
        raise UsageError(
            f"{key}: {target} holds an adapter of the type {kind}; what can be fused is plain bottleneck adapters, "
            "as houlsby and pfeiffer make them"
        )
    return config
