"""Where a model comes from: a hub id, a directory, a .gguf file or an alias; what is wrong there is one line."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from peftctl.errors import ArtifactError, PeftctlError, RunError, UsageError
from peftctl.models import shapes
from peftctl.models.aliases import ALIASES, resolve
from peftctl.recipe.schema import ModelSection


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Args:
        name: As the user wrote it, for messages.
        place: What the library loads: a directory or a hub id.
        folder: `place` as a path, None for a hub id.
        options: Keyword arguments of every `from_pretrained`.
    """

    name: str
    place: str
    folder: Path | None
    options: dict[str, Any]

    @property
    def gguf(self) -> bool:
        """Whether it is a .gguf file in `folder`."""
        return "gguf_file" in self.options


def source_of(model: ModelSection) -> Source:
    """Find the model.

    Raises:
        UsageError: It looks like a path, and nothing is there.
    """
    name = model.name_or_path
    path = Path(resolve(name)).expanduser()
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"{name}: no such file")
        return Source(name, str(path.parent), path.parent, options | {"gguf_file": path.name})
    if path.is_dir():
        return Source(name, str(path), path, options)
    if path.is_file():
        raise UsageError(f"{name}: is a file; expected a model directory, a .gguf file or a hub id")
    place = resolve(name)
    if place.startswith(("/", ".", "~")) or place.count("/") > 1:
        raise UsageError(f"{name}: no such directory; expected a model directory, a .gguf file or a hub id")
    revision = model.revision or "main"
    if hub_answers():
        return Source(name, place, None, options | {"revision": revision})
    folder = _downloaded(name, place, revision)
    return Source(name, str(folder), folder, options)


def _downloaded(name: str, hub_id: str, revision: str) -> Path:
    """Return the copy that an earlier download left on this machine."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:  # ValueError: not a name that a hub id can have
        problem = "not on this machine, and the model hub can't be reached"
        raise UsageError(f"{name}: {problem}; {_instead(name)}") from error


def _instead(name: str) -> str:
    """Return what to do where a model is not to be had."""
    if name in ALIASES:
        return "fetch it with: python scripts/fetch_demo_models.py"
    shape = shapes.find(name)
    if shape is None:
        return f"give a local directory, or a demo model ({' or '.join(ALIASES)})"
    code = " and model.trust_remote_code=true" if shape.remote_code else ""
    return f"`check` and `train --dry-run` plan with its shapes; to train, give a directory with its weights{code}"


@cache
def hub_answers() -> bool:
    """Tell at once whether the hub can be reached; the library's own retries take most of a minute a file."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the reason is, only files on this machine can be loaded
        return False
    return True


def refuse_folder(source: Source) -> None:
    """Raise a UsageError where a directory is not a model's."""
    folder = source.folder
    if folder is None or source.gguf or (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        hint = "it is an adapter; give its base model, or merge it first: peftctl merge"
    elif (folder / "adapter").is_dir() or (folder / "model").is_dir():
        hint = "it is a run directory; give its model/, or merge it first: peftctl merge"
    else:
        hint = "expected a directory with config.json, *.safetensors and tokenizer files"
    raise UsageError(f"{source.name}: holds no config.json; {hint}")


def refuse_weights(source: Source) -> None:
    """Raise where the weight files of a directory are missing, of an unsafe kind or damaged."""
    if source.folder is None or source.gguf:
        return
    from safetensors import SafetensorError, safe_open

    files = sorted(source.folder.glob("*.safetensors"))
    if not files:
        pickled = any(source.folder.glob("*.bin")) or any(source.folder.glob("*.pt"))
        hint = (
            "pickle files can run code and are not loaded, convert them" if pickled else "copy or download the weights"
        )
        raise UsageError(f"{source.name}: holds no *.safetensors file; {hint}")
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{file}: damaged or cut short ({error}); copy or download it again") from error
    index = source.folder / "model.safetensors.index.json"
    with explained(source, f"{index.name} can't be read"):
        listed = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else set()
    missing = sorted(listed - {file.name for file in files})
    if missing:
        raise ArtifactError(f"{source.name}: lacks {some(missing)}, listed in {index.name}; copy or download it again")


@contextmanager
def explained(source: Source, failure: str) -> Iterator[None]:
    """Turn whatever the libraries raise into one line; the cause stays attached for PEFTCTL_DEBUG."""
    try:
        yield
    except Exception as error:
        raise _explain(source, failure, error) from error


def _explain(source: Source, failure: str, error: Exception) -> PeftctlError:
    text = str(error)
    if isinstance(error, PeftctlError):
        return error
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        return RunError(f"{source.name}: its weights do not fit on the device; take a smaller model or dtype")
    first = (text.strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
    if "trust_remote_code" in text:
        return UsageError(
            f"{source.name}: comes with its own Python code; read it, then set model.trust_remote_code=true"
        )
    if "flash_attn" in text or "FlashAttention" in text:
        return UsageError(f"model.attn_implementation: {first}; leave it out, or take sdpa")
    if source.folder is None and "safetensors" in text:
        return UsageError(f"{source.name}: the hub has no safetensors weights of it; pickle files are not loaded")
    if source.folder is None and isinstance(error, OSError):
        return UsageError(f"{source.name}: {first}; check the name, model.revision and your access to it")
    if "for this kind of AutoModel" in text or "does not recognize this architecture" in text:
        return UsageError(f"{source.name}: {failure}: {first}; take another model, or update transformers")
    return ArtifactError(f"{source.name}: {failure}: {first}; the files may be damaged: copy or download them again")


def some(names: Collection[str]) -> str:
    """Return the first three names."""
    shown = sorted(names)[:3]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


def weights_folder(model: ModelSection) -> Path:
    """Return the directory that a model's weights were loaded from: its own, or the hub's copy on this machine."""
    from huggingface_hub import snapshot_download

    source = source_of(model)
    return source.folder or Path(snapshot_download(source.place, revision=model.revision, local_files_only=True))
