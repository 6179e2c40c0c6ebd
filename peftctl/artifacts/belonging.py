"""Whose adapter is it? Compares an adapter's record with a base's files, before any weights are loaded."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from peftctl.artifacts.checks import ADAPTER_WEIGHTS
from peftctl.artifacts.locate import ADAPTER_CONFIG, Artefact, fetched, locate
from peftctl.errors import ArtifactError, UsageError
from peftctl.methods import registry
from peftctl.models.aliases import resolve
from peftctl.models.fingerprint import directory_fingerprint, weights_fingerprint
from peftctl.models.load import load_model
from peftctl.recipe.schema import ModelSection


def finished_adapter(target: str, key: str) -> Artefact:
    """Return the finished adapter that a recipe key names, with its files here.

    Args:
        target: Run directory, adapter directory or hub id.
        key: The dotted key, for messages.

    Raises:
        UsageError: There is none, its run is not finished, or it is a whole model or only a template.
    """
    try:
        artefact = fetched(locate(target))
    except UsageError as error:
        raise UsageError(f"{key}: {error}") from error
    if not artefact.is_adapter:
        raise UsageError(f"{key}: {target} is a whole model, not an adapter; give it as model.name_or_path instead")
    if not artefact.has_weights:
        raise UsageError(f"{key}: {target} holds a tokenizer with its template and no weights; leave it out")
    return artefact


def refuse_unmergeable(artefact: Artefact, key: str) -> None:
    """Raise a UsageError where the adapter's method says that it can't be folded into weights."""
    name = artefact.manifest.get("method")
    if name in registry.names() and not (card := registry.get(name).card).mergeable:
        raise UsageError(f"{key}: {artefact.target}: {card.title} can't be merged: {card.merge_note}")


def refuse_other_base(
    artefact: Artefact, model: ModelSection, earlier: Sequence[str], key: str, *, beside: bool = False
) -> None:
    """Raise where an adapter was made for another base than a recipe has.

    An adapter without a record of its base, as other tools write them, passes; so does any where the base's files are
    not on this machine: the weights tell later.

    Args:
        artefact: The adapter.
        model: The recipe's base.
        earlier: Digests of the adapters that are merged into it first.
        key: The dotted key, for messages.
        beside: Whether it may also have been trained without these, side by side with them.

    Raises:
        UsageError: It was.
    """
    record = artefact.manifest.get("base", {})
    if record.get("fingerprint") is None:
        return
    made_of = record.get("made_of", {})
    inside = [entry["sha256"] for entry in made_of.get("adapters", [])]
    if inside == list(earlier):
        expected = made_of.get("fingerprint") if inside else record["fingerprint"]
    elif inside:
        names = ", ".join(entry["name"] for entry in made_of["adapters"])
        raise UsageError(
            f"{key}: {artefact.target} is an adapter of another base: it was trained on {made_of['name']} with {names} "
            "merged in; list exactly these before it in model.adapters"
        )
    elif earlier and not beside:
        raise UsageError(
            f"{key}: {artefact.target} is an adapter of another base: it was trained without model.adapters; "
            "train it further without them, or merge it too"
        )
    else:
        expected = record["fingerprint"]
    found = None if expected is None else _fingerprint(model, expected, record.get("dtype"))
    if found is not None and found != expected:
        raise UsageError(
            f"{key}: {artefact.target} is an adapter of another base: it was trained on {record['name']} with "
            f"fingerprint {expected[:12]}, {model.name_or_path} has {found[:12]}"
        )


def adapter_digest(artefact: Artefact) -> str:
    """Return the sha256 (hex) of an adapter's weights and settings.

    Raises:
        ArtifactError: A file is missing.
    """
    assert artefact.folder is not None  # a finished adapter lies in a directory
    digest = hashlib.sha256()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        file = artefact.folder / name
        try:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        except OSError as error:
            raise ArtifactError(f"{file}: can't be read ({error.strerror})") from error
    return digest.hexdigest()


def peft_settings(artefact: Artefact) -> Any:
    """Return an adapter's PeftConfig, defaults included.

    Raises:
        ArtifactError: It can't be read, or is of a type that this peft does not have.
    """
    from peft import PeftConfig

    import peftctl.tuners  # noqa: F401  # peft learns our types of adapters

    try:
        with warnings.catch_warnings(action="ignore"):  # keys of a later peft
            return PeftConfig.from_pretrained(str(artefact.folder))
    except (KeyError, ValueError, TypeError) as error:
        raise ArtifactError(f"{artefact.target}: {ADAPTER_CONFIG} is not one that peft reads ({error})") from error


def label(artefact: Artefact) -> str:
    """Return what an adapter is called outside this machine: the name of its run or directory, or its hub id."""
    if artefact.path is None:
        return artefact.target
    path = artefact.path.absolute()
    return path.parent.name if path.name == "adapter" else path.name


def _fingerprint(model: ModelSection, expected: str, dtype: Any) -> str | None:
    """Return a base's fingerprint; None where its files are not here."""
    place = Path(resolve(model.name_or_path)).expanduser()
    if not place.is_dir() and place.suffix != ".gguf":
        config = try_to_load_from_cache(str(place), "config.json", revision=model.revision)
        place = Path(config).parent if isinstance(config, str) else place
    if not place.is_dir() or not any(place.glob("*.safetensors")):
        return None
    found = directory_fingerprint(place)
    if found == expected:
        return found
    # Files may hold tensors that the model does not have, and float16 rounds otherwise: only the weights are certain.
    section = model.model_copy(update={"adapters": []} | ({"dtype": dtype} if dtype else {}))
    return weights_fingerprint(load_model(section))
