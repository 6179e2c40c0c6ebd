"""What a wheel holds does on its own: its recipes, configurations and shapes are found from an empty directory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The tree that goes into a wheel, built beside nothing else."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    steps = ["egg_info", "--egg-base", str(folder), "build_py", "--build-lib", str(folder / "lib")]
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", *steps]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "lib"


@pytest.fixture
def peftctl(built, tmp_path):
    """Runs the built package in a directory that holds nothing."""

    def call(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "peftctl", *map(str, arguments)],
            capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(built)},
        )  # fmt: skip

    return call


def test_recipes_list_show_copy_and_schema(peftctl, built, tmp_path):
    listed = json.loads(peftctl("recipes", "list", "--json").stdout)
    own = sorted(path.stem for path in (REPOSITORY / "recipes").glob("*.yaml"))
    assert [entry["name"] for entry in listed] == own
    assert all(Path(entry["path"]).is_relative_to(built) for entry in listed)
    shown = peftctl("recipes", "show", "lora").stdout
    assert shown == (REPOSITORY / "recipes" / "lora.yaml").read_text(encoding="utf-8")
    assert peftctl("recipes", "copy", "lora", "my.yaml").returncode == 0
    assert (tmp_path / "my.yaml").read_text(encoding="utf-8") == shown
    assert "properties" in json.loads(peftctl("recipes", "schema").stdout)


def test_a_copied_recipe_finds_the_data_of_the_wheel(peftctl, built, tmp_path):
    peftctl("recipes", "copy", "lora", "my.yaml")
    code = (
        "import json, peftctl\nfrom peftctl.commands.recipes import load_recipe\n"
        "recipe = load_recipe('my.yaml', ['backend={name: deepspeed, config: configs/deepspeed/zero2.json}'])\n"
        "print(json.dumps([peftctl.__file__, recipe.data.train, recipe.backend.config]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(built)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    module, rows, config = json.loads(done.stdout)
    for path in (module, *([rows] if isinstance(rows, str) else rows), config):
        assert Path(path).is_relative_to(built), path


def test_shapes_and_configurations_are_packed(built):
    packed = {path.name for path in (built / "peftctl" / "models" / "shapes").glob("*.json")}
    assert packed == {path.name for path in (REPOSITORY / "peftctl" / "models" / "shapes").glob("*.json")}
    configs = {path.name for path in (built / "peftctl" / "_data" / "configs" / "deepspeed").iterdir()}
    assert configs == {path.name for path in (REPOSITORY / "configs" / "deepspeed").iterdir()}
