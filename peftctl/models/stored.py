"""A model's weights one at a time, so that two large models can be compared in little memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import nn

from peftctl.errors import ArtifactError
from peftctl.models.aliases import resolve
from peftctl.models.classifier import Head
from peftctl.models.fingerprint import directory_fingerprint, weights_fingerprint
from peftctl.models.load import load_model, meta_model
from peftctl.recipe.schema import ModelSection


class StoredWeights:
    """The weights of a model by name: read from its safetensors files where these hold the model's own names.

    Other models (.gguf files, checkpoints whose names the library maps to its own) are loaded whole, in float32, when
    the first weight is asked for.

    Args:
        section: The model.
        head: What a classifier's head is made for; None takes what the configuration says.
    """

    def __init__(self, section: ModelSection, head: Head | None = None):
        self.section = section
        self.head = head
        self.model = meta_model(section, head=head)
        named = dict(self.model.named_parameters(remove_duplicate=False))
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tuple(p.shape) for name, p in named.items()}
        first: dict[int, str] = {}
        self.owner: Mapping[str, str] = {name: first.setdefault(id(p), name) for name, p in named.items()}
        """Of tied weights the first name, of others their own."""
        self.folder = _local_folder(section)
        self._files = _files(self.folder) if self.folder else {}

    @property
    def place(self) -> str:
        """Where the weights come from: equal for equal sources."""
        return str(self.folder.resolve()) if self.folder else f"{self.section.name_or_path}@{self.section.revision}"

    @property
    def streams(self) -> bool:
        """Whether single weights are read from files."""
        return set(self.owner.values()) <= self._files.keys()

    def get(self, name: str) -> torch.Tensor:
        """Return a weight in float32, on the CPU.

        Raises:
            ArtifactError: The file is damaged, or does not fit config.json.
        """
        owner = self.owner[name]
        if not self.streams:
            return self._loaded[owner].detach().float()
        file = self._files[owner]
        with _opened(file) as tensors:
            weight = tensors.get_tensor(owner)
        if tuple(weight.shape) != self.shapes[name]:
            raise ArtifactError(
                f"{file}: {owner} is {tuple(weight.shape)}, expected {self.shapes[name]} by config.json; "
                "one of the two is wrong"
            )
        return weight.float()

    def fingerprint(self) -> str:
        """Return the fingerprint of the weights, see `models.fingerprint`."""
        if self.streams and self.folder:
            return directory_fingerprint(self.folder)
        return weights_fingerprint(self._whole)

    @cached_property
    def _whole(self) -> nn.Module:
        return load_model(self.section, dtype="float32", head=self.head)

    @cached_property
    def _loaded(self) -> Mapping[str, torch.Tensor]:
        return dict(self._whole.named_parameters())


def _local_folder(section: ModelSection) -> Path | None:
    """Return the directory of a model whose files are on this machine; None for .gguf files and hub ids elsewhere."""
    place = Path(resolve(section.name_or_path)).expanduser()
    if place.is_dir():
        return place
    if place.suffix == ".gguf":
        return None
    config = try_to_load_from_cache(str(place), "config.json", revision=section.revision)
    return Path(config).parent if isinstance(config, str) else None


def _files(folder: Path) -> dict[str, Path]:
    """Return the file of every stored tensor."""
    found = {}
    index = folder / "model.safetensors.index.json"
    listed = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else None
    for file in sorted(folder.glob("*.safetensors")):
        if listed is None or file.name in listed:
            with _opened(file) as tensors:
                found.update(dict.fromkeys(tensors.keys(), file))
    return found


def _opened(file: Path):  # type: ignore[no-untyped-def]  # safetensors has no types
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file}: damaged or cut short ({error}); copy or download it again") from error
