"""peftctl.json: what an artefact is, what base it needs, and how it was made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftctl.errors import ArtifactError
from peftctl.methods.base import Card
from peftctl.models.aliases import ALIASES
from peftctl.recipe.schema import Recipe

NAME = "peftctl.json"
FORMAT = 1


@dataclass(frozen=True)
class ArtifactInfo:
    """What an artefact says about itself.

    Args:
        method: Name of the method.
        card: Its card.
        recipe: The run's resolved recipe.
        base_fingerprint: Of the base model's weights, before training.
        facts: Figures of the run for the model card; None and NaN are left out.
    """

    method: str
    card: Card
    recipe: Recipe
    base_fingerprint: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def build(
    recipe: Recipe,
    base_fingerprint: str,
    chat_template: Any,
    config_changes: Mapping[str, Any] | None = None,
    head: Mapping[str, Any] | None = None,
    tasks: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the content of peftctl.json for the result of a run.

    Args:
        recipe: The run's recipe.
        base_fingerprint: Of the base model's weights.
        chat_template: The tokenizer's: a string, a mapping of names to strings, or None.
        config_changes: What the base's configuration must be changed to before the result is attached, by key.
        head: `labels` and `pad_token_id` of a classifier's head; None for a language model.
        tasks: Of a method that trains several: their names, in the order of `data.sources`; see `of_task`.
    """
    return {
        "format": FORMAT,
        "method": recipe.method.name,
        "config": recipe.method.model_dump(mode="json"),
        "base": {
            "name": portable_name(recipe.model.name_or_path),
            "revision": recipe.model.revision,
            "fingerprint": base_fingerprint,
            "dtype": recipe.model.dtype,
            "quantization": recipe.quantization.model_dump() if recipe.quantization.bits else None,
            **_made_of(recipe),
        },
        "task": recipe.model.task,
        "template": recipe.data.template,
        "template_hash": hashlib.sha256(json.dumps(chat_template).encode()).hexdigest() if chat_template else None,
        "config_changes": dict(config_changes or {}),
        "tasks": list(tasks),
        **({"head": dict(head)} if head else {}),
    }


def of_task(content: Mapping[str, Any], task: str, *, alone: bool) -> dict[str, Any]:
    """Return the content of peftctl.json for one task of an artefact with several.

    Args:
        content: What `build` returned.
        task: Its name.
        alone: It lies in a folder of its own, and others can't be asked for there.
    """
    own = {"name": task, "source": content["tasks"].index(task)}
    return {**content, "tasks": [] if alone else content["tasks"], "own_task": own}


def _made_of(recipe: Recipe) -> dict[str, Any]:
    """Return what a base with adapters merged in, which is a run's own base/, was made of."""
    if not recipe.model.adapters:
        return {}
    record = read(Path(recipe.model.name_or_path))
    return {"made_of": {**record["base"], "adapters": record["adapters"]}}


def portable_name(name_or_path: str) -> str:
    """Return an alias or hub id as it is, and a local path made absolute."""
    if name_or_path not in ALIASES and (path := Path(name_or_path).expanduser()).exists():
        return str(path.resolve())
    return name_or_path


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Write peftctl.json into a folder that is still aside."""
    (folder / NAME).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's peftctl.json; empty where it has none, as with artefacts of other tools.

    Raises:
        ArtifactError: It is damaged, or of a later format.
    """
    if not (folder / NAME).is_file():
        return {}
    content = read_json(folder / NAME)
    if content.get("format") != FORMAT:
        raise ArtifactError(
            f"{folder / NAME}: expected format {FORMAT}, found {content.get('format')!r}; a newer peftctl may read it"
        )
    missing = {"method", "base", "task"} - content.keys()
    if missing or not isinstance(content["base"], dict):
        raise ArtifactError(f"{folder / NAME}: is damaged: no {', '.join(sorted(missing)) or 'base'} in it")
    return content


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object from a file of an artefact.

    Raises:
        ArtifactError: The file is missing or damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: can't be read ({error})") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{file}: expected a JSON object, found a {type(content).__name__}")
    return content
