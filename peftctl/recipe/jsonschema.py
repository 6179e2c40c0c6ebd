"""The JSON schema of recipes, for editors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from peftctl.recipe.loader import MethodSchema
from peftctl.recipe.schema import Recipe

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_json_schema(methods: Mapping[str, MethodSchema]) -> dict[str, Any]:
    """Return the schema of a whole recipe (JSON Schema draft 2020-12).

    Args:
        methods: Method name -> its schema; the `method` section is one of theirs, told apart by `name`.
    """
    schema = Recipe.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    definitions["DataSection"]["anyOf"] = [{"required": ["train"]}, {"required": ["sources"]}]
    for name, method in methods.items():
        definitions |= _method_definitions(name, method.config)
    schema["properties"]["method"] = {
        "description": "What trains, and its options; `name` chooses.",
        "oneOf": [{"$ref": f"#/$defs/{_definition(name)}"} for name in methods],
    }
    return {"$schema": DIALECT, **schema}


def _definition(name: str) -> str:
    return f"method_{name}"


def _method_definitions(name: str, config: type[BaseModel]) -> dict[str, Any]:
    """Return the definitions of one method; those it nests get its name in front, so that two methods can't clash."""
    schema = config.model_json_schema(ref_template=f"#/$defs/{_definition(name)}_{{model}}")
    nested = {f"{_definition(name)}_{key}": value for key, value in schema.pop("$defs", {}).items()}
    described = schema["properties"].get("name", {}).get("description", "The method.")
    schema["properties"]["name"] = {"const": name, "description": described}
    schema["required"] = ["name", *(key for key in schema.get("required", ()) if key != "name")]
    return {_definition(name): {**schema, "title": name, "additionalProperties": False}, **nested}
