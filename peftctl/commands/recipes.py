"""`peftctl recipes`, and the wiring of the recipe loader with the methods' schemas."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftctl.errors import UsageError, did_you_mean
from peftctl.methods import registry
from peftctl.recipe.jsonschema import recipe_json_schema
from peftctl.recipe.loader import place_of, read_recipe
from peftctl.recipe.paths import data_root
from peftctl.recipe.schema import Recipe

# Of a shipped recipe, which is in block style: read so, since checking a hundred recipes to list them takes seconds.
_MODEL = re.compile(r"^  name_or_path: *(\S+)", re.MULTILINE)

_KEY = re.compile(r"([a-z]+)\.([a-z_]+)(?:\[\d+\])?: ")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check everything that needs no model.

    Args:
        path: A YAML file, or the name of a shipped recipe.
        overrides: `KEY=VALUE` with a dotted key, e.g. `train.learning_rate=1e-4`.

    Raises:
        RecipeError: All problems at once, each with its place.
    """
    return read_recipe(path, overrides, registry.schemas())


@contextmanager
def placed(path: str | Path, overrides: Sequence[str]) -> Iterator[None]:
    """Add to an error about a key of a recipe where the recipe sets it: what follows loading knows keys, not lines.

    Args:
        path: The recipe.
        overrides: As given to `load_recipe`.
    """
    try:
        yield
    except UsageError as error:
        named = _KEY.match(str(error))
        if named is None or named[1] not in Recipe.model_fields:
            raise
        key = f"{named[1]}.{named[2]}"
        where = place_of(path, overrides, key).removesuffix(f": {key}")  # on the command line the key is the place
        raise UsageError(f"{where}: {error}") from error


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe of the package: its name, its first comment line, its model, its file."""

    name: str
    title: str
    model: str
    path: Path


def shipped() -> list[ShippedRecipe]:
    """Return the recipes that come with the package, sorted by name."""
    found = []
    for path in sorted((data_root() / "recipes").glob("*.yaml"), key=lambda path: path.stem):
        text = path.read_text(encoding="utf-8")
        title = text.splitlines()[0].lstrip("# ").split(" -- ", 1)[-1]
        model = _MODEL.search(text)
        found.append(ShippedRecipe(path.stem, title, model[1] if model else "", path))
    return found


def find(name: str) -> ShippedRecipe:
    """Return a shipped recipe.

    Raises:
        UsageError: There is none of that name; the message suggests the nearest.
    """
    recipes = {recipe.name: recipe for recipe in shipped()}
    key = Path(name).name.removesuffix(".yaml")
    if key not in recipes:
        raise UsageError(f"no shipped recipe '{name}'; {did_you_mean(key, recipes)}")
    return recipes[key]


def copy(name: str, target: Path) -> Path:
    """Copy a shipped recipe to a file or into a directory; an existing file is never overwritten."""
    recipe = find(name)
    destination = target / recipe.path.name if target.is_dir() else target
    if destination.exists():
        raise UsageError(f"{destination} exists already; give another path")
    try:
        shutil.copyfile(recipe.path, destination)
    except OSError as error:
        raise UsageError(f"{destination}: can't be written ({error.strerror})") from error
    return destination


def schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, for editors."""
    return recipe_json_schema(registry.schemas())
