"""The README says what is there: every key of the recipe, every method, every command."""

import runpy
from pathlib import Path

import pytest

from peftctl.methods import registry
from peftctl.models.aliases import is_fetched

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_schema_and_the_cards():
    if not is_fetched("smollm2-135m"):
        pytest.skip("scripts/fetch_demo_models.py has not been run")
    assert runpy.run_path(str(ROOT / "scripts" / "readme_tables.py"))["refreshed"](README) == README, (
        "run: python scripts/readme_tables.py"
    )


@pytest.mark.parametrize("name", registry.names())
def test_every_method_stands_there_with_its_keys(name):
    keys = [key for key in registry.get(name).Config.model_fields if key != "name"]
    rows = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
    assert rows
    assert not keys or any(all(f"`{key}`" in row for key in keys) for row in rows)


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README
