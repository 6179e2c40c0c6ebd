"""What a run writes about itself reads back, whichever choice a recipe makes among the values of a method's keys."""

import types
import typing

import pytest

import peftctl
from peftctl.errors import RecipeError
from peftctl.methods import registry
from peftctl.recipe.write import dump_recipe


def choices(annotation):
    origin = typing.get_origin(annotation)
    if annotation is bool:
        return ["true", "false"]
    if origin is typing.Literal:
        return list(typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        return [choice for part in typing.get_args(annotation) for choice in choices(part)]
    return []


def variants(name):
    """Yield the shipped recipe with each choice that it may take alone."""
    for key, info in type(peftctl.load_recipe(name).method).model_fields.items():
        for choice in choices(info.annotation):
            try:
                yield peftctl.load_recipe(name, [f"method.{key}={choice}"])
            except RecipeError:  # needs other keys too
                continue


@pytest.mark.parametrize("name", registry.names())
def test_it_reads_back(name, tmp_path):
    file = tmp_path / "recipe.yaml"
    count = 0
    for recipe in variants(name):
        file.write_text(dump_recipe(recipe, registry.get(name).unread))
        assert peftctl.load_recipe(file).method == recipe.method
        count += 1
    assert count  # `name` at least
