"""Every shipped recipe, found by its file: it reads, says what it is and trains; counts on the real model."""

from pathlib import Path

import pytest

import peftctl
from peftctl.commands.prepare import shapes
from peftctl.methods import registry
from peftctl.models.aliases import ALIASES, is_fetched

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def by_stem(path):
    return path.stem


def test_every_method_has_its_recipe():
    assert set(registry.names()) <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=by_stem)
def test_the_head_says_what_it_is_and_how_to_run_it(path):
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]
    assert first.startswith(f"# recipes/{path.name} -- ")
    assert f"recipes/{path.name}" in second or "quickstart.sh" in second


@pytest.mark.parametrize("path", RECIPES, ids=by_stem)
def test_it_writes_into_a_run_directory_of_its_own(path):
    assert peftctl.load_recipe(path).train.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=by_stem)
def test_it_trains_a_few_steps_on_a_tiny_model(path, tiny_dir, tmp_path):
    overrides = [f"model.name_or_path={tiny_dir}", f"train.output_dir={tmp_path / 'run'}", "eval.metrics=[loss]"]
    if path.stem != "hard_prompt":
        overrides.append("train.max_steps=2")
    result = peftctl.train(peftctl.load_recipe(path, overrides))
    assert result.summary["eval"]["after"]["loss"] > 0
    assert result.summary["steps"] == (0 if path.stem == "hard_prompt" else 2)


@pytest.mark.parametrize(
    ("recipe", "overrides", "count"),
    [
        ("lora", ["method.target_modules=[q_proj, v_proj]"], 460_800),
        ("lora", ["method.target_modules=null"], 460_800),
        ("lora", [], 2_442_240),
        ("lora", ["method.target_modules=[q_proj, k_proj, v_proj, o_proj]"], 921_600),
        ("lora", ["method.r=16"], 4_884_480),
        ("last_layers", [], 7_080_192),
        ("full", [], 134_515_008),
        ("hard_prompt", [], 0),
    ],
)
def test_counts_on_smollm2_are_those_of_the_papers_formulas(recipe, overrides, count):
    if not is_fetched("smollm2-135m"):
        pytest.skip("scripts/fetch_demo_models.py has not been run")
    loaded = peftctl.load_recipe(recipe, [*overrides, "model.dtype=float32"])
    method = registry.get(loaded.method.name)(loaded.method)
    assert shapes(loaded, method) == (count, 134_515_008)


def test_recipes_use_the_demo_models_by_their_aliases():
    assert {peftctl.load_recipe(path).model.name_or_path for path in RECIPES} <= ALIASES.keys()
