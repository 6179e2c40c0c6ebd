"""Find out what a target is: a run, an adapter, a model or a hub id; by file names alone, without loading anything."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from peftctl.artifacts import manifest as manifests
from peftctl.artifacts.checks import ADAPTER_WEIGHTS
from peftctl.artifacts.rundir import RunDir
from peftctl.errors import UsageError, did_you_mean
from peftctl.models.aliases import ALIASES
from peftctl.models.source import hub_answers

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
ADAPTER_CONFIG = "adapter_config.json"
# Of a hub repository: all that an adapter consists of, and no weights of a whole model.
_ADAPTER_FILES = [
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, manifests.NAME,
    "tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab*", "merges.txt",
]  # fmt: skip


@dataclass(frozen=True)
class Artefact:
    """Something that can be loaded.

    Args:
        target: As the user wrote it.
        kind: `hub` stands for every model that is not a directory here: hub ids, aliases and .gguf files.
        path: The run directory, or the artefact's own; None for `hub`.
        folder: Where its files are: adapter/ or model/ of a run, else `path`.
        is_adapter: It needs a base model.
        manifest: Content of peftctl.json; empty where another tool wrote the artefact.
        base: What the base loads from; None for a model without a record of one.
        recipe: recipe.yaml of the run that it belongs to.
    """

    target: str
    kind: Literal["run", "adapter", "model", "hub"]
    path: Path | None = None
    folder: Path | None = None
    is_adapter: bool = False
    manifest: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    recipe: Path | None = None

    @property
    def has_weights(self) -> bool:
        """False for an adapter that is only a tokenizer with its template."""
        return not self.is_adapter or (self.folder is not None and (self.folder / ADAPTER_CONFIG).is_file())


def locate(target: str | Path) -> Artefact:
    """Find out what a target is, from file names alone.

    Args:
        target: Run directory, adapter directory, model directory, .gguf file, hub id or alias.

    Raises:
        UsageError: There is nothing, something else, or a run without a result yet.
        ArtifactError: peftctl.json is damaged.
    """
    if not isinstance(target, str | Path):
        raise UsageError("expected one target here; `load`, and `peftctl chat` and `merge`, take several")
    name, path = str(target), Path(target).expanduser()
    if name in ALIASES or path.suffix == ".gguf":
        return Artefact(name, "hub")
    if path.is_dir():
        return _from_directory(name, path)
    if path.exists():
        raise UsageError(f"{name}: is a file; expected a run, adapter or model directory, a .gguf file or a hub id")
    if _means_path(name, path):
        raise UsageError(f"{name}: no such directory{_nearest(path)}")
    return Artefact(name, "hub")


def fetched(artefact: Artefact) -> Artefact:
    """Return what an artefact of kind `hub` is once its small files are here; others as they are."""
    if artefact.kind != "hub" or artefact.target in ALIASES or artefact.target.endswith(".gguf"):
        return artefact
    folder = _hub_adapter(artefact.target)
    return artefact if folder is None else replace(_adapter(artefact.target, folder), kind="hub", path=None)


def of_task(artefact: Artefact, task: str) -> Artefact:
    """Return one task of an artefact with several.

    Args:
        artefact: What `fetched` returned.
        task: Its name, or its number among `data.sources`, from 0.

    Raises:
        UsageError: There is no such task.
    """
    tasks = artefact.manifest.get("tasks", [])
    name = tasks[int(task)] if task not in tasks and task.isdecimal() and int(task) < len(tasks) else task
    if name not in tasks:
        hint = f"; {did_you_mean(task, tasks)}" if tasks else ""
        raise UsageError(f"{artefact.target}: has no task '{task}'{hint}")
    if name == artefact.manifest["own_task"]["name"]:
        return artefact
    assert artefact.folder is not None  # its manifest was read there
    folder = artefact.folder / name
    if artefact.kind == "hub":
        snapshot_download(artefact.target, allow_patterns=[f"{name}/*"])
    return replace(artefact, folder=folder, manifest=manifests.read(folder))


def _from_directory(name: str, path: Path) -> Artefact:
    run = RunDir(path)
    if run.holds_run():
        if _is_model(run.model):
            return replace(_model(name, run.model), kind="run", path=path, recipe=run.recipe)
        if _is_adapter(run.adapter):
            return replace(_adapter(name, run.adapter), kind="run", path=path, recipe=run.recipe)
        raise UsageError(f"{name}: this run is not finished; go on with: peftctl train {run.recipe} --resume")
    home = path.absolute().parent
    recipe = RunDir(home.parent if path.name in manifests.read(home).get("tasks", []) else home).recipe
    found = recipe if recipe.is_file() else None
    if _is_adapter(path):
        return replace(_adapter(name, path), recipe=found)
    if _is_model(path):
        return replace(_model(name, path), recipe=found)
    if (path / "trainer_state.json").is_file():
        raise UsageError(f"{name}: is a checkpoint, made for going on; give its run directory")
    raise UsageError(
        f"{name}: holds neither a run, an adapter nor a model; expected recipe.yaml, {ADAPTER_CONFIG} or config.json"
    )


def _adapter(name: str, folder: Path) -> Artefact:
    manifest = manifests.read(folder)
    base = manifest.get("base", {}).get("name")
    moved = base is not None and base.startswith("/") and not Path(base).exists()
    own = RunDir(folder.absolute().parent).base  # a run with model.adapters takes its base along
    if moved and "made_of" in manifest["base"] and _is_model(own):
        base = str(own)
    elif (folder / ADAPTER_CONFIG).is_file():
        elsewhere = manifests.read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        base = elsewhere if base is None or moved else base
    return Artefact(name, "adapter", folder, folder, is_adapter=True, manifest=manifest, base=base)


def _model(name: str, folder: Path) -> Artefact:
    manifest = manifests.read(folder)
    return Artefact(name, "model", folder, folder, manifest=manifest, base=manifest.get("base", {}).get("name"))


def _is_adapter(folder: Path) -> bool:
    if (folder / ADAPTER_CONFIG).is_file():
        return True
    return (folder / manifests.NAME).is_file() and not _is_model(folder)


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _means_path(name: str, path: Path) -> bool:
    if name.startswith(("/", "./", "../", "~")) or name.endswith("/") or not _HUB_ID.fullmatch(name):
        return True
    return len(path.parts) > 1 and path.parent.is_dir()


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; {path.parent} does not exist either"
    siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; did you mean '{path.parent / near[0]}'?" if near else ""


def _hub_adapter(name: str) -> Path | None:
    """Return the local copy of a hub repository that holds an adapter; None for one that holds a model."""
    try:
        cached = try_to_load_from_cache(name, ADAPTER_CONFIG)
        if isinstance(cached, str):
            return Path(cached).parent
        if not hub_answers():
            return None
        folder = Path(snapshot_download(name, allow_patterns=_ADAPTER_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None  # loading it as a model explains what is wrong with the name
    return folder if (folder / ADAPTER_CONFIG).is_file() else None
