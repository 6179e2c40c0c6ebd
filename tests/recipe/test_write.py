import string

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftctl.recipe.loader import read_recipe
from peftctl.recipe.schema import DataSection, EvalSection, ModelSection, Recipe, TrainSection
from peftctl.recipe.write import diff_recipes, dump_recipe
from tests.recipe.fakes import GOOD, METHODS, LoraConfig, PromptConfig, read, write

TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30),
    st.sampled_from(
        [
            "2e-5",
            "3e5",
            "yes",
            "null",
            "~",
            "",
            "007",
            "1_000",
            "${HOME}",
            "$${x}",
            "$$${",
            "<<",
            "=",
            "# x",
            "a: b",
            "- x",
            "*a",
            "&a",
            "!t",
            "%d",
            "@",
            "`",
            "|",
            ">",
            "a\nb\n",
            " x ",
            "\t",
            "{a}",
            "[a",
            "'",
            '"',
            "...",
            "---",
            "\x85",
            "\u2028",
            "\ufeff",
        ]
    ),
)
RATES = st.floats(min_value=0, max_value=1e30, allow_nan=False)
COUNTS = st.integers(min_value=1, max_value=10**9)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)

lora = st.builds(
    LoraConfig,
    r=COUNTS,
    alpha=st.floats(min_value=1e-30, max_value=1e30),
    dropout=st.floats(min_value=0, max_value=0.5),
    target_modules=st.none() | TEXTS | st.lists(TEXTS, max_size=3),
    warm=st.none() | COUNTS | st.floats(min_value=1e-9, max_value=0.999),
    scope=st.just("auto") | COUNTS,
    start=st.none() | TEXTS,
    extra=st.dictionaries(TEXTS, JSON, max_size=3),
)
model = st.builds(ModelSection, name_or_path=st.just("org/tiny"), revision=st.none() | TEXTS)
data = st.builds(
    DataSection,
    train=st.just("org/rows"),
    eval=st.none() | st.just("org/held"),
    columns=st.dictionaries(st.sampled_from(["messages", "tools"]), TEXTS),
    template=TEXTS,
    loss_on=st.sampled_from(["completion", "all"]),
    max_dropped=st.floats(min_value=0, max_value=1),
    pad_to_multiple_of=st.none() | COUNTS,
)
steps = st.fixed_dictionaries({"epochs": st.floats(min_value=1e-6, max_value=1e6)}) | st.fixed_dictionaries(
    {"max_steps": COUNTS}
)
train = steps.flatmap(
    lambda bound: st.builds(
        TrainSection,
        output_dir=st.text(string.ascii_letters, min_size=1, max_size=5).map("runs/".__add__),
        learning_rate=RATES,
        warmup_steps=st.none() | COUNTS,
        seed=st.integers(0, 2**32 - 1),
        report_to=st.lists(st.sampled_from(["wandb", "tensorboard"]), max_size=2),
        gradient_checkpointing=st.booleans(),
        **{key: st.just(value) for key, value in bound.items()},
    )
)
measured = st.builds(EvalSection, metrics=st.just(["contains"]), pattern=st.none() | TEXTS, rows=st.none() | COUNTS)
recipes = st.builds(Recipe, model=model, method=lora, data=data, train=train, eval=measured)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(recipe=recipes)
def test_what_is_written_reads_back_equal(here, recipe):
    write(here, dump_recipe(recipe))
    again = read_recipe("x.yaml", (), METHODS)
    assert again == recipe
    assert not diff_recipes(again, recipe)


def test_the_layout(here):
    text = dump_recipe(read(GOOD, "train.warmup_ratio=0.03", "data.columns.messages=turns", "train.learning_rate=1e-5"))
    lines = text.splitlines()
    assert [line for line in lines if not line.startswith((" ", "-"))] == [
        "model:",
        "method:",
        "data:",
        "train:",
        "backend:",
        "eval:",
    ]
    assert "  r: 4" in lines
    assert "  warmup_ratio: 0.03" in lines
    assert "    messages: turns" in lines
    assert "null" not in text
    assert "revision" not in text
    assert lines.index("  output_dir: runs/x") < lines.index("  epochs: 1.0") < lines.index("  batch_size: 8")
    assert isinstance(yaml.safe_load(text)["train"]["learning_rate"], float)


def test_a_recipe_of_every_kind_of_silence_reads_back(here):
    for text, overrides in [
        (GOOD, ["train.max_steps=3"]),
        (GOOD, ["train.warmup_steps=3"]),
        (GOOD + "  max_steps: null\n", []),
        (GOOD.replace("rows.jsonl", "rows.jsonl\n  format: text"), []),
        (GOOD.replace("r: 4", "start: null"), []),
        (GOOD.replace("rows.jsonl", "[rows.jsonl, held.jsonl]"), []),
    ]:
        recipe = read(text, *overrides)
        assert read(dump_recipe(recipe)) == recipe


def test_what_a_method_implies_and_does_not_read_reads_back(here):
    text = GOOD.replace("name: lora\n  r: 4", "name: prompt\n  tokens: 5").replace("  learning_rate: 2e-4\n", "")
    unread = METHODS["prompt"].unread
    for more in ("", "  warmup_ratio: null\n", "  warmup_steps: 4\n", "  max_steps: 4\n"):
        recipe = read(text + more)
        dumped = dump_recipe(recipe, unread)
        assert "weight_decay" not in dumped
        assert "eval:" not in dumped
        assert read(dumped) == recipe
    assert "  learning_rate: 0.3\n" in dumped


def test_differences(here):
    old = read(GOOD)
    assert diff_recipes(old, old) == []
    new = read(
        GOOD,
        "train.learning_rate=1e-4",
        "method.target_modules=[a, b]",
        "data.columns.messages=turns",
        "train.gradient_checkpointing=true",
        "train.output_dir=runs/y",
        "model.revision=main",
    )
    assert diff_recipes(old, new, ignore=["train.output_dir"]) == [
        "model.revision: unset -> main",
        "method.target_modules: unset -> [a, b]",
        "train.learning_rate: 0.0002 -> 0.0001",
        "train.gradient_checkpointing: false -> true",
        "data.columns.messages: unset -> turns",
    ]
    assert diff_recipes(old, new, ignore=["train", "model", "method", "data.columns"]) == []


def test_differences_between_methods(here):
    old = read(GOOD)
    new = old.model_copy(update={"method": PromptConfig(name="prompt", tokens=3)})
    lines = diff_recipes(old, new)
    assert "method.name: lora -> prompt" in lines
    assert "method.r: 4 -> unset" in lines
    assert "method.tokens: unset -> 3" in lines


@pytest.mark.parametrize("value", [2e-4, 1e-5, 1e-300, 1e22, 0.1, 3e5])
def test_floats_stay_floats(here, value):
    recipe = read(GOOD, f"train.learning_rate={value!r}")
    assert read(dump_recipe(recipe)).train.learning_rate == value
