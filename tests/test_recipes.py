"""Every shipped recipe, found by its file: it reads, says what it is, plans and trains; counts on the real shapes."""

import json
from functools import cache
from pathlib import Path

import pytest

import peftctl
from peftctl.commands.check import check
from peftctl.commands.prepare import shapes
from peftctl.errors import UsageError
from peftctl.methods import registry
from peftctl.models.aliases import ALIASES, is_fetched
from peftctl.models.load import meta_model
from peftctl.models.shapes import find
from tests import tiny
from tests.methods import earlier

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# What a tiny model can't be asked for: hardware, long schedules, large batches, short rows in tokens of few letters.
SMALL = (
    "model.dtype=float32",
    "data.max_length=512",
    "train.max_steps=2",
    "train.warmup_steps=null",
    "train.batch_size=4",
    "train.gradient_accumulation=1",
)


def by_stem(path):
    return path.stem


def shape_of(path):
    """Return the shipped shapes of a worked example's model; None for the recipes on demo models."""
    return find(peftctl.load_recipe(path).model.name_or_path)


EXAMPLES = [path for path in RECIPES if shape_of(path)]
"""Recipes on models that are too large to be here."""
TRAINABLE = [path for path in RECIPES if not (shape_of(path) and shape_of(path).remote_code)]


def first_rows(path, folder):
    """Return overrides to the first rows of each file of a recipe; `check` has seen all of them."""
    overrides = []
    data = peftctl.load_recipe(path).data
    for key, file, count in (("train", data.train, 24), ("eval", data.eval, 8)):
        if isinstance(file, str):
            some = folder / f"{key}.jsonl"
            some.write_text("".join(Path(file).read_text(encoding="utf-8").splitlines(keepends=True)[:count]), "utf-8")
            overrides.append(f"data.{key}={some}")
    return overrides


def earlier_runs(path, folder):
    """Return overrides to tiny runs in the place of those that a recipe builds on."""
    recipe = peftctl.load_recipe(path)
    make = earlier.RUNS.get(recipe.method.name)
    keys = make(folder, recipe.method, recipe.model.task, tiny.tiny_llama) if make else {}
    return [f"method.{key}={json.dumps(value)}" for key, value in keys.items()]


@pytest.fixture(scope="module")
def tiny_folders(tmp_path_factory):
    """Return a function: architecture -> folder of a tiny model of it."""

    @cache
    def make(model_type):
        model = getattr(tiny, f"tiny_{model_type}")()
        return tiny.save_tiny(tmp_path_factory.mktemp(model_type) / "model", model)

    return make


@pytest.fixture(scope="module")
def tiny_cache(tmp_path_factory):
    """A cache where a tiny model lies under the names of the demo models."""
    root = tmp_path_factory.mktemp("cache")
    for alias in ALIASES:
        encoder = alias == "minilm-l6"
        tiny.save_tiny(root / "models" / alias, tiny.tiny_bert(max_position_embeddings=512) if encoder else None)
    return root


@pytest.fixture
def tiny_demo_models(monkeypatch, tiny_cache):
    """The demo models are tiny, and no hub answers."""
    monkeypatch.setenv("PEFTCTL_CACHE", str(tiny_cache))


def test_every_method_has_its_recipe():
    assert set(registry.names()) <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=by_stem)
def test_the_head_says_what_it_is_and_how_to_run_it(path):
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]
    assert first.startswith(f"# recipes/{path.name} -- ")
    assert f"recipes/{path.name}" in second or "quickstart.sh" in second


@pytest.mark.parametrize("path", RECIPES, ids=by_stem)
def test_it_is_in_block_style(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(": ")
        assert key.lstrip().startswith("#") or not value.startswith(("{", "[")), line


@pytest.mark.parametrize("path", RECIPES, ids=by_stem)
def test_it_writes_into_a_run_directory_of_its_own(path):
    assert peftctl.load_recipe(path).train.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=by_stem)
def test_it_passes_check_and_plans_offline(path, tiny_demo_models, tmp_path):
    overrides = ["model.dtype=float32", *(["data.max_length=512"] if path in EXAMPLES else [])]
    overrides += earlier_runs(path, tmp_path)
    report = check(peftctl.load_recipe(path, overrides), device="cuda", memory="4TB")
    assert report.fits and report.plan.total >= report.plan.weights > 0
    assert (report.trainable > 0) == (path.stem != "hard_prompt")
    counted = [notice for notice in report.notices if "the tokenizer of smollm2-135m" in notice]
    assert bool(counted) == (path in EXAMPLES)
    if path in EXAMPLES:
        row = next(line for line in README.splitlines() if line.startswith(f"| `{path.stem}` |"))
        assert row.endswith(f" | {report.trainable:,} |")


@pytest.mark.parametrize("path", TRAINABLE, ids=by_stem)
def test_it_trains_a_few_steps_on_a_tiny_model(path, tiny_folders, tmp_path):
    shape = shape_of(path)
    encoder = peftctl.load_recipe(path).model.name_or_path == "minilm-l6"
    folder = tiny_folders(shape.config["model_type"] if shape else "bert" if encoder else "llama")
    overrides = [f"model.name_or_path={folder}", f"train.output_dir={tmp_path / 'run'}", "eval.metrics=[loss]"]
    overrides += first_rows(path, tmp_path) + earlier_runs(path, tmp_path / "earlier")
    if shape:
        overrides += [*SMALL, "backend.name=single", "backend.config=null"]
    elif path.stem != "hard_prompt":
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
        ("longlora", [], 29_268_288),
        ("lisa", [], 35_392_320),
        ("lora", ["method.target_modules=[q_proj, k_proj, v_proj, o_proj]"], 921_600),
        ("lora", ["method.r=16"], 4_884_480),
        ("dora", ["method.r=8"], 2_597_760),
        ("adalora", [], 3_665_880),
        ("lora_fa", ["method.r=8"], 1_244_160),
        ("vera", ["method.target_modules=[q_proj, v_proj]"], 38_400),
        ("ia3", [], 57_600),
        ("houlsby", ["method.train_norms=false"], 4_462_080),
        ("prompt_tuning", [], 11_520),
        ("prefix_tuning", [], 6_012_416),
        ("prefix_tuning", ["method.projection=false"], 230_400),
        ("last_layers", [], 7_080_192),
        ("full", [], 134_515_008),
        ("hard_prompt", [], 0),
    ],
)
def test_counts_on_smollm2_are_those_of_the_papers_formulas(recipe, overrides, count):
    if not is_fetched("smollm2-135m"):
        pytest.skip("scripts/fetch_demo_models.py has not been run")
    assert counted(recipe, overrides) == (count, 134_515_008)


def counted(recipe, overrides):
    loaded = peftctl.load_recipe(recipe, [*overrides, "model.dtype=float32"])
    method = registry.get(loaded.method.name)(loaded.method)
    return shapes(loaded, method, meta_model(loaded.model, allow_stand_in=True))


@pytest.mark.parametrize(
    ("recipe", "overrides", "count"),
    [
        ("lora-bloomz-7b1-zero2", [], 30 * 8 * (4096 + 12288)),
        ("lora-chatglm3-6b", [], 1_949_696),
        ("lora-opt6.7b", [], 32 * 128 * (4 * (4096 + 4096) + 2 * (4096 + 16384))),
        ("lora-lit-7b", [], 4_194_304),
        ("lora-lit-7b", ["method.r=16"], 8_388_608),
        ("lora-lit-7b", ["method.r=16", "model.name_or_path=huggyllama/llama-13b"], 13_107_200),
        ("lora-lit-7b", ["method.r=16", "model.name_or_path=huggyllama/llama-30b"], 25_559_040),
        ("lora-llama2-7b-all-linear", [], 32 * 256 * (4 * (4096 + 4096) + 3 * (4096 + 11008))),
        ("lora-alpaca-llama7b", [], 4_194_304),
    ],
)
def test_counts_of_the_worked_examples(recipe, overrides, count):
    assert counted(recipe, overrides)[0] == count


def test_lora_on_gpt3_trains_ten_thousand_times_fewer_parameters_than_it_has():
    trainable, total = counted("lora-lit-7b", ["model.name_or_path=gpt3-175b", "method.r=4"])
    assert trainable == 96 * 2 * 4 * (12288 + 12288)
    assert 9_000 < total / trainable < 10_000  # "10,000 times", as the paper rounds it


def test_recipes_use_demo_models_or_models_whose_shapes_are_known():
    names = {peftctl.load_recipe(path).model.name_or_path for path in RECIPES}
    assert all(name in ALIASES or find(name) for name in names)


def test_bloomz_rows_are_input_newline_target_and_the_end(tiny_demo_models):
    report = check(peftctl.load_recipe("lora-bloomz-7b1-zero2"), preview_rows=5, device="cuda", memory="80GB")
    lines = (ROOT / "recipes/data/belle_train.jsonl").read_text(encoding="utf-8").splitlines()
    for line, pieces in zip(map(json.loads, lines), report.previews, strict=False):
        assert list(pieces) == [(line["input"] + "\n", False), (line["target"] + "<|im_end|>", True)]


def test_bloomz_asks_deepspeed_for_what_the_example_had():
    config = json.loads(Path(peftctl.load_recipe("lora-bloomz-7b1-zero2").backend.config).read_bytes())
    zero = config["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["contiguous_gradients"]) == (2, True, True)
    assert (zero["offload_optimizer"]["device"], config["gradient_clipping"]) == ("cpu", "auto")


@pytest.mark.parametrize("path", EXAMPLES, ids=by_stem)
def test_training_without_the_weights_is_refused_in_one_line(path, tiny_demo_models, tmp_path):
    overrides = [f"train.output_dir={tmp_path / 'run'}", "backend.name=single", "backend.config=null"]
    recipe = peftctl.load_recipe(path, overrides)
    with pytest.raises(UsageError, match=r"not on this machine.*to train, give a directory with its weights") as caught:
        peftctl.train(recipe)
    assert ("trust_remote_code=true" in str(caught.value)) == shape_of(path).remote_code
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
