"""What `peftctl model` shows of a recipe: every module that its method trains, with rank, alpha and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftctl.artifacts import ranks
from peftctl.commands.earlier import base_tokenizer
from peftctl.commands.model_report import Report, ranks_report, share
from peftctl.commands.prepare import fit_rows, with_concrete_dtype
from peftctl.commands.recipes import load_recipe
from peftctl.methods import registry
from peftctl.methods.base import Context
from peftctl.models.load import meta_model
from peftctl.models.vocabulary import add_tokens
from peftctl.recipe.schema import Recipe


def recipe_report(target: str, overrides: Sequence[str]) -> Report:
    """Return what a recipe trains, from shapes alone.

    Args:
        target: A recipe file, or the name of a shipped recipe.
        overrides: KEY=VALUE on it.

    Raises:
        RecipeError: The recipe is wrong.
        UsageError: The method does not fit the model.
    """
    recipe = with_concrete_dtype(load_recipe(target, overrides))
    model, total = trained_shapes(recipe)
    rows = ranks.of_model(model)
    trained = sum(row.parameters for row in rows)
    name = recipe.model.name_or_path
    title = f"{recipe.method.name} on {name}: {trained:,} of {total:,} parameters train ({share(trained, total)})"
    content = {"recipe": target, "method": recipe.method.name, "model": name, "total": total}
    return ranks_report(title, rows, content)


def trained_shapes(recipe: Recipe) -> tuple[Any, int]:
    """Return the model that a recipe trains, on the meta device, and the parameters of its base."""
    method = registry.get(recipe.method.name)(recipe.method)
    model = meta_model(recipe.model, allow_stand_in=True)
    if recipe.model.add_tokens or recipe.model.adapters:
        tokenizer = base_tokenizer(recipe, allow_stand_in=True)
        method.new_token_ids = add_tokens(tokenizer, recipe.model.add_tokens)
        fit_rows(model, recipe, tokenizer)
    total = sum(p.numel() for p in model.parameters())
    return method.apply(model, Context(recipe)), total
