"""`peftctl methods`: what there is, and what one method does."""

from __future__ import annotations

from functools import cache
from typing import Any

from peftctl.commands import recipes
from peftctl.commands.prepare import prepare
from peftctl.methods import _matrix, registry
from peftctl.models.aliases import is_fetched
from peftctl.models.load import meta_model
from peftctl.recipe.schema import CLASSIFICATION, ModelSection, Recipe, Task


def describe_all() -> list[dict[str, Any]]:
    """Return every method's card as plain data, by category and name."""
    found = [describe(name) for name in registry.names()]
    return sorted(found, key=lambda card: (card["category"], card["name"]))


def describe(name: str) -> dict[str, Any]:
    """Return one method's card, what its shipped recipe trains of the demo model, and the keys of its section.

    Raises:
        UsageError: There is no such method.
    """
    method = registry.get(name)
    card = method.card
    keys = {
        key: {"default": field.get_default(call_default_factory=True), "description": field.description}
        for key, field in method.Config.model_fields.items()
        if key != "name"
    }
    return {
        "name": name,
        "title": card.title,
        "category": card.category,
        "paper": card.paper,
        "summary": card.summary,
        "trains": card.trains,
        "count": card.count,
        "recipe": _shipped_count(name),
        "mergeable": card.mergeable,
        "merge_note": card.merge_note,
        "identity_at_init": card.identity_at_init,
        "identity_note": card.identity_note,
        "disable_note": card.disable_note,
        "needs": card.needs,
        "tasks": list(card.tasks),
        "supports": sorted(card.supports),
        "engines": _engines(name),
        "keys": keys,
        "implies": dict(method.defaults),
    }


def describe_matrix() -> dict[str, Any]:
    """Return which methods hold with which storage of the base through which engine, as far as it has been tried."""
    cells = {name: dict(row["cells"]) for name, row in _matrix.rows().items()}
    return {"engines": _matrix.ENGINES, "storages": _matrix.STORAGES, "methods": cells}


def _engines(name: str) -> list[str]:
    """Return the engines that a method holds through, by the storage of the base."""
    cells = _matrix.rows().get(name, {}).get("cells", {})
    found = {s: [e for e in _matrix.ENGINES if cells.get(f"{s}/{e}") == ""] for s in _matrix.STORAGES}
    return [f"{engine} ({storage})" for storage, engines in found.items() for engine in engines]


def _shipped_count(name: str) -> dict[str, Any]:
    """Return the model of a method's shipped recipe and how much of it trains.

    None where the model is not here, and where the recipe builds on runs of the user's.
    """
    recipe = recipes.load_recipe(recipes.find(name).path)
    model = recipe.model.name_or_path
    builds_on = registry.get(name)(recipe.method).inputs()
    known = is_fetched(model) and not any(builds_on.values())
    return {"model": model, "trainable": trainable(recipe) if known else None}


def trainable(recipe: Recipe) -> int:
    """Return how many parameters a recipe trains, by its method's closed form on the model's shapes."""
    if recipe.model.task in CLASSIFICATION:
        return prepare(recipe).trainable  # the rows say how many classes the head has
    method = registry.get(recipe.method.name)(recipe.method)
    return method.count(_shapes(recipe.model.name_or_path, recipe.model.task))


@cache
def _shapes(name: str, task: Task) -> Any:
    return meta_model(ModelSection(name_or_path=name, task=task, dtype="float32"))
