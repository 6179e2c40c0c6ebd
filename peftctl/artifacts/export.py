"""Put a checked copy of an artefact where it is to be used: for plain peft and transformers, or for Ollama."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peftctl.artifacts import export_card, ollama_folder
from peftctl.artifacts.checks import check_weights
from peftctl.artifacts.locate import ADAPTER_CONFIG, Artefact, fetched, locate
from peftctl.artifacts.manifest import NAME, read_json
from peftctl.artifacts.merge import merge
from peftctl.artifacts.model_card import public_name
from peftctl.artifacts.rundir import staged
from peftctl.artifacts.vllm import vllm_notices
from peftctl.errors import UsageError, did_you_mean

FORMATS = ("hf", "ollama")
_INSTEAD = {
    "gguf": "export with --format hf --merged, then run llama.cpp's convert_hf_to_gguf.py on the result",
    "vllm": "--format hf is what vLLM loads; it says what vLLM would refuse",
}
# What other trainers leave beside an adapter, for going on.
_LEFT_OUT = shutil.ignore_patterns(
    ".*", "optimizer.*", "scheduler.*", "rng_state*", "trainer_state.json", "training_args.bin"
)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        output: The directory.
        content: `adapter`, `model`, or `tokenizer` for a result without weights.
        template: Family of the Ollama template; None for other formats.
        notices: What the user should know.
    """

    output: Path
    content: str
    template: str | None = None
    notices: tuple[str, ...] = ()


def export(
    target: str | Path,
    format: str,
    output: str | Path,
    *,
    merged: bool | None = None,
    rows: Sequence[Sequence[int]] | None = None,
    repository: str | None = None,
) -> Exported:
    """Write an artefact, checked, as a folder that needs no peftctl; whole or not at all.

    Args:
        target: Run, adapter or model directory, or the hub id of an adapter.
        format: `hf`: what plain peft or transformers loads. `ollama`: a Modelfile with what it names.
        output: Directory to write; must not exist, or be empty.
        merged: Fold an adapter into its base; left out, for Ollama only.
        rows: Token ids of held-out rows for the gate of a merge; left out, fixed sentences.
        repository: OWNER/NAME that the folder is made for: names of this machine's directories are left out of it.

    Raises:
        UsageError: The format is not available or can't hold the artefact, or `output` is taken.
        ArtifactError: Weights are damaged, empty or not finite, or a merge changes the answers.
        RunError: The disk is full.
    """
    if format in _INSTEAD:
        raise UsageError(f"--format {format}: not in this version; {_INSTEAD[format]}")
    if format not in FORMATS:
        raise UsageError(f"--format {format}: unknown; {did_you_mean(format, FORMATS)}")
    artefact, place = fetched(locate(target)), Path(output).expanduser()
    if artefact.folder is None:
        raise UsageError(f"{target}: has no directory to copy; give a run, an adapter or a model directory")
    if os.path.lexists(place) and not (place.is_dir() and not any(place.iterdir())):
        raise UsageError(f"--output: {place} exists already; choose another")
    if artefact.has_weights:
        check_weights(artefact.folder)
    fold = partial(merge, artefact, rows=rows)
    with staged(place) as folder:
        if format == "ollama":
            done = _write_ollama(artefact, folder, place, merged is not False, fold)
        else:
            done = _write_hf(artefact, folder, place, bool(merged), fold, repository)
        if repository is not None:
            _forget_machine(folder, artefact)
    return done


def _write_ollama(artefact: Artefact, folder: Path, place: Path, merged: bool, fold: Callable[[Path], Any]) -> Exported:
    choice, notices = ollama_folder.write(artefact, folder, merged=merged, fold=fold)
    content = "adapter" if (folder / "adapter").is_dir() else "model"
    return Exported(place, content, choice.family, tuple(notices))


def _write_hf(
    artefact: Artefact,
    folder: Path,
    place: Path,
    merged: bool,
    fold: Callable[[Path], Any],
    repository: str | None,
) -> Exported:
    together = merged and artefact.is_adapter
    if together:
        fold(folder)
    else:
        shutil.copytree(str(artefact.folder), folder, ignore=_LEFT_OUT)
    if artefact.manifest:
        name = repository or "DIRECTORY"
        card = export_card.render(artefact, folder, merged=together, name=name)
        (folder / "README.md").write_text(card, encoding="utf-8")
    if together or not artefact.is_adapter:
        return Exported(place, "model")
    if not artefact.has_weights:
        return Exported(place, "tokenizer")
    notices = vllm_notices(read_json(folder / ADAPTER_CONFIG)) + _base_notice(artefact, repository)
    return Exported(place, "adapter", notices=tuple(notices))


def _base_notice(artefact: Artefact, repository: str | None) -> list[str]:
    """Tell where others will not find the base that the adapter needs."""
    if "made_of" in artefact.manifest.get("base", {}):
        return ["its base is the run's own base/, with earlier adapters merged in; --merged needs no other files"]
    if repository is not None and artefact.base is not None and Path(artefact.base).is_absolute():
        return [f"its base is {public_name(artefact.base)}, a directory of this machine; others need it, or --merged"]
    return []


def _forget_machine(folder: Path, artefact: Artefact) -> None:
    """Call the base by its public name, and leave paths of this machine out of what is published."""
    public = None if artefact.base is None else public_name(artefact.base)
    for file in folder.rglob(ADAPTER_CONFIG):
        _rewrite(file, {"base_model_name_or_path": public})
    for file in folder.rglob(NAME):
        record = read_json(file)
        record["base"] = {**record["base"], "name": public}
        if "merged" in record:
            record["merged"] = {key: value for key, value in record["merged"].items() if key != "adapter"}
        _rewrite(file, record)


def _rewrite(file: Path, changes: dict[str, Any]) -> None:
    content = read_json(file) | changes
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
