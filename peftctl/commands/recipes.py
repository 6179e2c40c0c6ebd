"""`peftctl recipes`, and the wiring of the recipe loader with the methods' schemas."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftctl.errors import UsageError, did_you_mean
from peftctl.methods import registry
from peftctl.recipe.jsonschema import recipe_json_schema
from peftctl.recipe.loader import read_recipe
from peftctl.recipe.paths import data_root
from peftctl.recipe.schema import Recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check everything that needs no model.

    Args:
        path: A YAML file, or the name of a shipped recipe.
        overrides: `KEY=VALUE` with a dotted key, e.g. `train.learning_rate=1e-4`.

    Raises:
        RecipeError: All problems at once, each with its place.
    """
    return read_recipe(path, overrides, registry.schemas())


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe of the package: its name, its first comment line, its file."""

    name: str
    title: str
    path: Path


def shipped() -> list[ShippedRecipe]:
    """Return the recipes that come with the package, sorted by name."""
    found = []
    for path in sorted((data_root() / "recipes").glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        title = first.lstrip("# ").split(" -- ", 1)[-1]
        found.append(ShippedRecipe(path.stem, title, path))
    return found


def find(name: str) -> ShippedRecipe:
    """Return a shipped recipe.

    Raises:
        UsageError: There is none of that name; the message suggests the nearest.
    """
    recipes = {recipe.name: recipe for recipe in shipped()}
    key = Path(name).stem
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
