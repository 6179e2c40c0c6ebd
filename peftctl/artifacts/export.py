"""Put a checked copy of an artefact where it is to be used."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from peftctl.artifacts.checks import check_weights
from peftctl.artifacts.locate import fetched, locate
from peftctl.artifacts.rundir import staged
from peftctl.errors import UsageError, did_you_mean

FORMATS = ("hf",)
NOT_YET = ("ollama", "gguf", "vllm")


def export(target: str | Path, format: str, output: str | Path) -> Path:
    """Copy an adapter or a model directory, checked, as one that plain peft or transformers loads.

    Args:
        target: Run, adapter or model directory, or the hub id of an adapter.
        format: `hf`.
        output: Directory to write; must not exist, or be empty.

    Returns:
        `output`.

    Raises:
        UsageError: The format is not available, there are no files to copy, or `output` is taken.
        ArtifactError: Weights are damaged, empty or not finite.
    """
    if format in NOT_YET:
        raise UsageError(f"--format {format}: not in this version; merge, then use that tool's converter on the result")
    if format not in FORMATS:
        raise UsageError(f"--format {format}: unknown; {did_you_mean(format, FORMATS)}")
    artefact, place = fetched(locate(target)), Path(output).expanduser()
    if artefact.folder is None:
        raise UsageError(f"{target}: has no directory to copy; give a run, an adapter or a model directory")
    if os.path.lexists(place) and not (place.is_dir() and not any(place.iterdir())):
        raise UsageError(f"--output: {place} exists already; choose another")
    if artefact.has_weights:
        check_weights(artefact.folder)
    with staged(place) as folder:
        shutil.copytree(artefact.folder, folder)
    return place
