import json
from typing import Any

import pytest

from peftctl.recipe.jsonschema import DIALECT, recipe_json_schema
from peftctl.recipe.nodes import plain
from peftctl.recipe.tree import parse
from tests.recipe.fakes import GOOD, METHODS

SCHEMA = recipe_json_schema(METHODS)


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Check what our schemas use: $ref, oneOf, anyOf, const, enum, type, properties, required, items, bounds."""
    if "$ref" in schema and not fits(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")]):
        return False
    if "oneOf" in schema and sum(fits(value, branch) for branch in schema["oneOf"]) != 1:
        return False
    if "anyOf" in schema and not any(fits(value, branch) for branch in schema["anyOf"]):
        return False
    if value != schema.get("const", value) or value not in schema.get("enum", [value]):
        return False
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "integer": int,
        "number": (int, float),
        "null": type(None),
    }
    if "type" in schema and not isinstance(value, kinds[schema["type"]]):
        return False
    if isinstance(value, dict) and set(schema.get("required", ())) - set(value):
        return False
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        if schema["additionalProperties"] is False and set(value) - set(known):
            return False
        return all(fits(item, known[key]) for key, item in value.items())
    if isinstance(value, list) and "items" in schema:
        return all(fits(item, schema["items"]) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value > schema.get("exclusiveMinimum", value - 1) and value >= schema.get("minimum", value)
    return True


@pytest.mark.parametrize(
    ("old", "new", "good"),
    [
        ("", "", True),
        ("r: 4", "r: 4\n  target_modules: [a]\n  warm: 0.5", True),
        ("name: lora\n  r: 4", "name: prompt\n  tokens: 3", True),
        ("learning_rate: 2e-4", "max_steps: null\n  report_to: [wandb]", True),
        ("r: 4", "tokens: 3", False),
        ("r: 4", "r: 0", False),
        ("name: lora\n  r: 4", "name: prompt", False),
        ("name: lora", "name: other", False),
        ("  name: lora\n", "", False),
        ("learning_rate", "learning_rat", False),
        ("2e-4", "fast", False),
        ("train: rows.jsonl", "format: text", False),
        ("train: rows.jsonl", "sources: [{path: a.jsonl, weight: 0.5}]", True),
        ("train: rows.jsonl", "sources: [{path: a.jsonl, weight: 0}]", False),
        ("train: rows.jsonl", "sources: [{weight: 2}]", False),
        ("train: rows.jsonl", "sources: [{path: a.jsonl, wait: 2}]", False),
        ("model:", "extra: 1\nmodel:", False),
    ],
)
def test_recipes_against_the_schema(old, new, good):
    root, _ = parse(GOOD.replace(old, new, 1), "x.yaml")
    assert fits(plain(root), SCHEMA) is good


def test_the_frame():
    assert SCHEMA["$schema"] == DIALECT
    assert SCHEMA["required"] == ["model", "method", "data", "train"]
    assert SCHEMA["additionalProperties"] is False
    json.dumps(SCHEMA)


def test_methods_are_told_apart_by_name():
    branches = SCHEMA["properties"]["method"]["oneOf"]
    definitions = [SCHEMA["$defs"][branch["$ref"].removeprefix("#/$defs/")] for branch in branches]
    assert [definition["properties"]["name"]["const"] for definition in definitions] == ["lora", "prompt"]
    assert all(definition["required"][0] == "name" for definition in definitions)
    assert all(definition["additionalProperties"] is False for definition in definitions)


def test_descriptions_come_from_docstrings():
    train = SCHEMA["$defs"]["TrainSection"]["properties"]
    assert train["learning_rate"]["description"] == "Peak learning rate."
    assert SCHEMA["$defs"]["method_lora"]["properties"]["r"]["description"] == "Rank of the update."
    assert SCHEMA["$defs"]["method_lora"]["description"] == "The `method:` section of a fake low-rank method."


def test_every_reference_leads_somewhere():
    def references(value: Any):
        if isinstance(value, dict):
            if "$ref" in value:
                yield value["$ref"]
            for item in value.values():
                yield from references(item)
        elif isinstance(value, list):
            for item in value:
                yield from references(item)

    targets = {reference.removeprefix("#/$defs/") for reference in references(SCHEMA)}
    assert targets <= set(SCHEMA["$defs"])
