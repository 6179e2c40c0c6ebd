"""The README says what is there: every key of the recipe, every method, every command."""

from pathlib import Path

import pytest

from peftctl.methods import registry
from peftctl.recipe import schema

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SECTIONS = {
    "model": schema.ModelSection,
    "quantization": schema.QuantizationSection,
    "data": schema.DataSection,
    "train": schema.TrainSection,
    "eval": schema.EvalSection,
    "backend": schema.BackendSection,
}


def documented(heading: str) -> dict[str, str]:
    """Return the rows of the table whose head starts with `heading`: key -> the rest of its row."""
    lines = iter(README.splitlines())
    assert any(line.startswith(f"| `{heading}") for line in lines), f"no table for {heading}"
    next(lines)
    rows = {}
    for line in lines:
        if not line.startswith("| `"):
            break
        key, _, rest = line[3:].partition("` | ")
        rows[key] = rest
    return rows


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_of_a_section_stands_in_the_reference_with_its_meaning(name):
    rows = documented(f"{name}:`")
    fields = SECTIONS[name].model_fields
    assert list(rows) == list(fields)
    for key, field in fields.items():
        assert " ".join((field.description or "").split()).replace("|", "/") in rows[key], key


@pytest.mark.parametrize("name", registry.names())
def test_every_method_stands_there_with_its_keys(name):
    keys = [key for key in registry.get(name).Config.model_fields if key != "name"]
    if keys:
        assert list(documented(f"method:` with `name: {name}`")) == keys
    assert f"| `{name}` |" in README


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README
