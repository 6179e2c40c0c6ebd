"""Find an artefact of any kind and load it for inference: what peftctl wrote, what plain peft wrote, and models."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from peftctl.artifacts import manifest as manifests
from peftctl.artifacts.checks import ADAPTER_WEIGHTS, read_keys
from peftctl.artifacts.dtypes import stored_dtype
from peftctl.artifacts.rundir import RunDir
from peftctl.errors import ArtifactError, UsageError, did_you_mean
from peftctl.models.aliases import ALIASES
from peftctl.models.fingerprint import weights_fingerprint
from peftctl.models.load import _hub_answers, load_model, load_tokenizer
from peftctl.recipe.schema import ModelSection

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ADAPTER_CONFIG = "adapter_config.json"
# Of a hub repository: all that an adapter consists of, and no weights of a whole model.
_ADAPTER_FILES = [
    _ADAPTER_CONFIG, ADAPTER_WEIGHTS, manifests.NAME,
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
        return not self.is_adapter or (self.folder is not None and (self.folder / _ADAPTER_CONFIG).is_file())


def locate(target: str | Path) -> Artefact:
    """Find out what a target is, from file names alone.

    Args:
        target: Run directory, adapter directory, model directory, .gguf file, hub id or alias.

    Raises:
        UsageError: There is nothing, something else, or a run without a result yet.
        ArtifactError: peftctl.json is damaged.
    """
    if not isinstance(target, str | Path):
        raise UsageError("several targets at once are not in this version; give one")
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


def load(
    target: str | Path,
    *,
    task: str | None = None,
    dtype: str | None = None,
    device: str | torch.device | None = None,
) -> tuple[Any, Any]:
    """Load an artefact of any kind, in eval mode.

    Args:
        target: See `locate`.
        task: Which task of an artefact with several.
        dtype: Of the weights; left out, what an adapter was trained on, and what a model is stored in.
        device: Where to put it; left out, the CPU.

    Returns:
        (model, tokenizer).

    Raises:
        UsageError: There is no such target or task.
        ArtifactError: Files are damaged, or the base is not the one that the adapter was trained on.
    """
    artefact = fetched(locate(target))
    tasks = artefact.manifest.get("tasks", [])
    if task is not None and task not in tasks:
        raise UsageError(f"{target}: has no task '{task}'" + (f"; {did_you_mean(task, tasks)}" if tasks else ""))
    if not artefact.is_adapter:
        section = ModelSection(
            name_or_path=str(artefact.folder or target),
            task=artefact.manifest.get("task", "causal_lm"),
            trust_remote_code=_trusts_code(artefact),
        )
        return load_model(section, dtype=dtype or stored_dtype(section), device=device), load_tokenizer(section)
    model = load_base(artefact, dtype=dtype, device=device)
    return attach(model, artefact), tokenizer_of(artefact)


def fetched(artefact: Artefact) -> Artefact:
    """Return what an artefact of kind `hub` is once its small files are here; others as they are."""
    if artefact.kind != "hub" or artefact.target in ALIASES or artefact.target.endswith(".gguf"):
        return artefact
    folder = _hub_adapter(artefact.target)
    return artefact if folder is None else replace(_adapter(artefact.target, folder), kind="hub", path=None)


def base_section(artefact: Artefact) -> ModelSection:
    """Return how the base of an adapter is loaded, in the type that it was trained in.

    Raises:
        ArtifactError: The adapter names no base.
    """
    if artefact.base is None:
        raise ArtifactError(f"{artefact.target}: {_ADAPTER_CONFIG} names no base model; add base_model_name_or_path")
    record = artefact.manifest.get("base", {})
    section = ModelSection(
        name_or_path=artefact.base,
        task=artefact.manifest.get("task", "causal_lm"),
        revision=record.get("revision"),
        trust_remote_code=_trusts_code(artefact),
    )
    return section.model_copy(update={"dtype": record.get("dtype") or stored_dtype(section)})


def load_base(
    artefact: Artefact, *, dtype: str | None = None, device: str | torch.device | None = None, base: str | None = None
) -> Any:
    """Load the base model of an adapter and check that it is the one the adapter was trained on.

    Args:
        artefact: An adapter.
        dtype: Of the weights; left out, what the adapter was trained on.
        device: Where to put it.
        base: Where it lies; left out, where the artefact says.

    Raises:
        ArtifactError: It is another base.
    """
    section = base_section(artefact)
    if base is not None:
        section = section.model_copy(update={"name_or_path": base, "revision": None})
    try:
        model = load_model(section, dtype=dtype or section.dtype, device=device)
    except UsageError as error:
        raise UsageError(f"{artefact.target}: its base model: {error}") from error
    expected = artefact.manifest.get("base", {}).get("fingerprint")
    if expected is None:
        return model
    found = weights_fingerprint(model)
    if found != expected and dtype not in (None, section.dtype):
        # float32 weights rounded to float16 can have another fingerprint: compare in the type of the record.
        found = weights_fingerprint(load_model(section))
    if found != expected:
        raise ArtifactError(
            f"{artefact.target}: is an adapter of another base: it was trained on {artefact.base} with fingerprint "
            f"{expected[:12]}, {section.name_or_path} has {found[:12]}"
        )
    return model


def attach(base: Any, artefact: Artefact) -> Any:
    """Put an adapter on its base; the base itself where the artefact is only a template.

    Raises:
        ArtifactError: Its files are damaged, or do not fit the base.
    """
    if not artefact.has_weights:
        return base
    from peft import PeftModel, get_peft_model_state_dict

    folder = artefact.folder
    assert folder is not None  # an adapter with weights lies in a directory
    present = read_keys(folder / ADAPTER_WEIGHTS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft warns of (missing keys, another base) is checked here
            model = PeftModel.from_pretrained(base, str(folder), is_trainable=False)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtifactError(f"{artefact.target}: the adapter does not fit {artefact.base}: {reason}") from error
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    wrong = sorted((wanted - present) | (present - wanted - set(model.state_dict())))
    if wrong:
        raise ArtifactError(
            f"{folder / ADAPTER_WEIGHTS}: its tensors are not those of {_ADAPTER_CONFIG}: {len(wrong)} differ, "
            f"e.g. {wrong[0]}"
        )
    return model.eval()


def tokenizer_of(artefact: Artefact) -> Any:
    """Return the tokenizer that lies with an adapter, else that of its base."""
    folder = artefact.folder
    if folder is not None and any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json")):
        return load_tokenizer(ModelSection(name_or_path=str(folder)))
    return load_tokenizer(base_section(artefact))


def _from_directory(name: str, path: Path) -> Artefact:
    run = RunDir(path)
    if run.holds_run():
        if _is_model(run.model):
            return replace(_model(name, run.model), kind="run", path=path, recipe=run.recipe)
        if _is_adapter(run.adapter):
            return replace(_adapter(name, run.adapter), kind="run", path=path, recipe=run.recipe)
        raise UsageError(f"{name}: this run is not finished; go on with: peftctl train {run.recipe} --resume")
    recipe = RunDir(path.absolute().parent).recipe
    found = recipe if recipe.is_file() else None
    if _is_adapter(path):
        return replace(_adapter(name, path), recipe=found)
    if _is_model(path):
        return replace(_model(name, path), recipe=found)
    if (path / "trainer_state.json").is_file():
        raise UsageError(f"{name}: is a checkpoint, made for going on; give its run directory")
    raise UsageError(
        f"{name}: holds neither a run, an adapter nor a model; expected recipe.yaml, {_ADAPTER_CONFIG} or config.json"
    )


def _adapter(name: str, folder: Path) -> Artefact:
    manifest = manifests.read(folder)
    base = manifest.get("base", {}).get("name")
    if (folder / _ADAPTER_CONFIG).is_file():
        elsewhere = manifests.read_json(folder / _ADAPTER_CONFIG).get("base_model_name_or_path")
        moved = base is not None and base.startswith("/") and not Path(base).exists()
        base = elsewhere if base is None or moved else base
    return Artefact(name, "adapter", folder, folder, is_adapter=True, manifest=manifest, base=base)


def _model(name: str, folder: Path) -> Artefact:
    manifest = manifests.read(folder)
    return Artefact(name, "model", folder, folder, manifest=manifest, base=manifest.get("base", {}).get("name"))


def _is_adapter(folder: Path) -> bool:
    if (folder / _ADAPTER_CONFIG).is_file():
        return True
    return (folder / manifests.NAME).is_file() and not _is_model(folder)


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _trusts_code(artefact: Artefact) -> bool:
    """Consent to run a model's code is the user's own recipe's; an artefact that travels can't carry it."""
    if artefact.recipe is None:
        return False
    try:
        recipe = yaml.safe_load(artefact.recipe.read_text(encoding="utf-8"))
        return recipe["model"].get("trust_remote_code") is True
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return False


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
        cached = try_to_load_from_cache(name, _ADAPTER_CONFIG)
        if isinstance(cached, str):
            return Path(cached).parent
        if not _hub_answers():
            return None
        folder = Path(snapshot_download(name, allow_patterns=_ADAPTER_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None  # loading it as a model explains what is wrong with the name
    return folder if (folder / _ADAPTER_CONFIG).is_file() else None
