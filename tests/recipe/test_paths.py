# ruff: noqa: E501 -- messages stand whole on a line, so that a search finds them
import pytest

from peftctl.errors import RecipeError
from peftctl.recipe import paths
from peftctl.recipe.paths import (
    Unresolved,
    check_output_dir,
    data_root,
    find_recipe,
    package_root,
    resolve_data,
    resolve_model,
)
from tests.recipe.fakes import GOOD, problems, read


@pytest.fixture
def places(here, monkeypatch):
    """The working directory, a recipe's folder and the package's data, each with its own files."""
    folder, package = here / "own", here / "package"
    for place, names in {
        folder: ["own.csv", "rows.jsonl"],
        package / "recipes" / "data": ["shipped.jsonl"],
        here / "many": ["b.parquet", "a.txt", "notes.md", ".hidden.json", "state.json", "dataset_info.json"],
    }.items():
        place.mkdir(parents=True)
        for name in names:
            (place / name).write_text("x")
    (package / "recipes" / "lora.yaml").write_text("x")
    (package / "recipes" / "lora_fa.yaml").write_text("x")
    (here / "empty").mkdir()
    monkeypatch.setattr(paths, "data_root", lambda: package)
    return here


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("rows.jsonl", ["rows.jsonl"]),  # the working directory comes first
        ("own.csv", ["own/own.csv"]),
        ("recipes/data/shipped.jsonl", ["package/recipes/data/shipped.jsonl"]),
        ("own/../rows.jsonl", ["rows.jsonl"]),
        ("*.jsonl", ["held.jsonl", "rows.jsonl"]),
        ("own.c?v", ["own/own.csv"]),
        ("**/*.[jp]*", ["held.jsonl", "many/b.parquet", "many/dataset_info.json", "many/state.json", "own/rows.jsonl"]),
        ("many", ["many/a.txt", "many/b.parquet"]),
        ("many/", ["many/a.txt", "many/b.parquet"]),
        ("many/*", ["many/a.txt", "many/b.parquet", "many/dataset_info.json", "many/state.json"]),
    ],
)
def test_local_data(places, value, found):
    resolved = resolve_data(value, places / "own")
    if value.startswith("**"):
        assert set(found) <= {path.removeprefix(f"{places}/") for path in resolved}
        assert resolved == sorted(resolved)
    else:
        assert resolved == [str(places / name) for name in found]


def test_absolute_paths_and_home(places, monkeypatch):
    monkeypatch.setenv("HOME", str(places))
    monkeypatch.setenv("USERPROFILE", str(places))
    assert resolve_data(str(places / "own" / "own.csv"), places) == [str(places / "own" / "own.csv")]
    assert resolve_data("~/own/own.csv", places) == [str(places / "own" / "own.csv")]


def test_a_file_whose_name_looks_like_a_glob(places):
    (places / "a[1].csv").write_text("x")
    assert resolve_data("a[1].csv", places) == [str(places / "a[1].csv")]


def test_a_glob_in_a_folder_whose_name_looks_like_one(places):
    odd = places / "odd[1]"
    odd.mkdir()
    (odd / "x.csv").write_text("x")
    assert resolve_data("x.*", odd) == [str(odd / "x.csv")]


@pytest.mark.parametrize("value", ["squad", "org/name", "allenai/c4", "org/name-2.0", "org/data_v1.1", "wmt/wmt19.en"])
def test_hub_ids(places, value):
    assert resolve_data(value, places) == value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("row.jsonl", "no such file: 'row.jsonl'; did you mean 'rows.jsonl'?"),
        ("own/own.cvs", "no such file: 'own/own.cvs'; did you mean 'own/own.csv'?"),
        ("recipes/data/shiped.jsonl", "no such file: 'recipes/data/shiped.jsonl'; did you mean 'recipes/data/shipped.jsonl'?"),
        ("x/y/z", "no such file: 'x/y/z'; paths start at the working directory, the recipe's folder or the package's data"),
        ("qq.tsv", "no such file: 'qq.tsv'; files that can be read end in json, jsonl, csv, parquet, arrow, txt"),
        ("qq.json", "no such file: 'qq.json'; paths start at the working directory, the recipe's folder or the package's data"),
        ("*.parquet", "no json, jsonl, csv, parquet, arrow, txt file matches '*.parquet'; paths start at the working directory, the recipe's folder or the package's data"),
        ("many/*.md", "no json, jsonl, csv, parquet, arrow, txt file matches 'many/*.md'; paths start at the working directory, the recipe's folder or the package's data"),
        ("many/notes.md", "expected an extension among json, jsonl, csv, parquet, arrow, txt, got '.md': 'many/notes.md'; convert the file"),
        ("empty", "no file to read in the directory 'empty'; it needs one of json, jsonl, csv, parquet, arrow, txt"),
        (" ", "expected a file, a glob, a directory or a hub id, got an empty text; give one"),
        ("x" * 5000 + ".csv", f"no such file: '{'x' * 5000}.csv'; paths start at the working directory, the recipe's folder or the package's data"),
    ],
)  # fmt: skip
def test_data_that_is_not_there(places, value, message):
    with pytest.raises(Unresolved) as caught:
        resolve_data(value, places / "own")
    assert str(caught.value) == message


def test_models(places):
    (places / "tiny").mkdir()
    (places / "own" / "small").mkdir()
    (places / "own" / "m.gguf").write_text("x")
    own = places / "own"
    assert resolve_model("tiny", own) == str(places / "tiny")
    assert resolve_model("./tiny", own) == str(places / "tiny")
    assert resolve_model("small", own) == str(own / "small")
    assert resolve_model("m.gguf", own) == str(own / "m.gguf")
    assert resolve_model("smollm2-135m", own) == "smollm2-135m"
    assert resolve_model("org/model-1.5B", own) == "org/model-1.5B"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("./smal", "no such model: './smal'; did you mean './small'?"),
        ("~/nowhere-at-all", "no such model: '~/nowhere-at-all'; give a directory, a .gguf file or a hub id like org/name"),
        ("/nowhere-at-all", "no such model: '/nowhere-at-all'; give a directory, a .gguf file or a hub id like org/name"),
        ("a/b/c", "no such model: 'a/b/c'; give a directory, a .gguf file or a hub id like org/name"),
        ("n.gguf", "no such model: 'n.gguf'; give a directory, a .gguf file or a hub id like org/name"),
        ("rows.jsonl", "expected a directory or a .gguf file, got the file 'rows.jsonl'; give its directory"),
        ("", "expected a model's name or path, got an empty text; give one"),
    ],
)  # fmt: skip
def test_models_that_are_not_there(places, value, message):
    (places / "small").mkdir()
    with pytest.raises(Unresolved) as caught:
        resolve_model(value, places / "own")
    assert str(caught.value) == message


def test_output_directories(here):
    (here / "taken").write_text("x")
    check_output_dir("runs/new")
    check_output_dir(str(here))
    with pytest.raises(Unresolved, match="expected a directory, but 'taken' is a file; choose another directory"):
        check_output_dir("taken")
    with pytest.raises(Unresolved, match="'taken' is a file"):
        check_output_dir("taken/below/it")
    with pytest.raises(Unresolved, match="got an empty text"):
        check_output_dir(" ")


@pytest.mark.parametrize("name", ["lora", "lora.yaml", "recipes/lora", "recipes/lora.yaml"])
def test_shipped_recipes_are_found_by_name(places, name):
    assert find_recipe(name) == places / "package" / "recipes" / "lora.yaml"


def test_a_local_recipe_comes_first(places):
    (places / "lora.yaml").write_text("x")
    (places / "lora").mkdir()
    assert str(find_recipe("lora.yaml")) == "lora.yaml"
    assert find_recipe("lora") == places / "package" / "recipes" / "lora.yaml"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lroa", "lroa: no such recipe; did you mean 'lora'?"),
        ("mine/lora.yaml", "mine/lora.yaml: no such recipe; did you mean 'lora' or 'lora_fa'?"),
        ("my-rcipe.yaml", "my-rcipe.yaml: no such recipe; did you mean 'my-recipe.yaml'?"),
        ("zzz.yaml", "zzz.yaml: no such recipe; give a YAML file, or a shipped recipe's name (`peftctl recipes list`)"),
        ("own", "own: expected a YAML file, got a directory; give own/RECIPE.yaml"),
        ("many", "many: expected a YAML file, got a directory; give many/recipe.yaml"),
        ("", ": no such recipe; give a YAML file, or a shipped recipe's name (`peftctl recipes list`)"),
        ("a\0b", "a\0b: no such recipe; give a YAML file, or a shipped recipe's name (`peftctl recipes list`)"),
    ],
)
def test_recipes_that_are_not_there(places, name, message):
    (places / "my-recipe.yaml").write_text("x")
    (places / "many" / "recipe.yaml").write_text("x")
    with pytest.raises(RecipeError) as caught:
        find_recipe(name)
    assert str(caught.value) == message


def test_the_package_s_own_folders():
    assert (package_root() / "recipe" / "paths.py").is_file()
    assert (data_root() / "recipes").is_dir()


def test_a_wheel_s_data_come_before_the_checkout(tmp_path, monkeypatch):
    (tmp_path / "peftctl" / "_data").mkdir(parents=True)
    monkeypatch.setattr(paths, "package_root", lambda: tmp_path / "peftctl")
    assert data_root() == tmp_path / "peftctl" / "_data"


def test_the_loader_places_path_problems_at_the_value(here):
    (here / "taken").write_text("x")
    text = GOOD.replace("rows.jsonl", '["*.jsonl", row.jsonl, org/name]').replace("runs/x", "taken")
    assert problems(text.replace("org/tiny", "./tiny")) == [
        "x.yaml:3:17: model.name_or_path: no such model: './tiny'; "
        "give a directory, a .gguf file or a hub id like org/name",
        "x.yaml:8:22: data.train[1]: no such file: 'row.jsonl'; did you mean 'rows.jsonl'?",
        "x.yaml:8:33: data.train[2]: 'org/name' is no file, and a hub id stands alone; "
        "correct the path, or write the hub id without a list",
        "x.yaml:10:15: train.output_dir: expected a directory, but 'taken' is a file; choose another directory",
    ]
    assert problems(GOOD, "data.train=row.jsonl") == [
        "command line: data.train: no such file: 'row.jsonl'; did you mean 'rows.jsonl'?"
    ]


def test_the_loader_resolves_paths(here):
    (here / "org" / "tiny").mkdir(parents=True)
    recipe = read(GOOD.replace("rows.jsonl", "'*.jsonl'"), "data.eval_fraction=0.1")
    assert recipe.data.train == [str(here / "held.jsonl"), str(here / "rows.jsonl")]
    assert recipe.data.eval is None
    assert recipe.model.name_or_path == str(here / "org" / "tiny")
    assert recipe.train.output_dir == "runs/x"
    assert read(GOOD.replace("rows.jsonl", "[rows.jsonl]")).data.train == str(here / "rows.jsonl")
    assert read(GOOD.replace("rows.jsonl", "[org/name]")).data.train == "org/name"


def test_paths_start_at_the_recipe_s_folder_too(here, monkeypatch):
    read(GOOD)
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    from peftctl.recipe.loader import read_recipe
    from tests.recipe.fakes import METHODS

    assert read_recipe("../x.yaml", (), METHODS).data.train == str(here / "rows.jsonl")
