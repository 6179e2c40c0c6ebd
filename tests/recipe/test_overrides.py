# ruff: noqa: E501 -- messages stand whole on a line, so that a search finds them
import pytest

from tests.recipe.fakes import GOOD, problems, read


def get(recipe, dotted):
    for step in dotted.split("."):
        recipe = getattr(recipe, step)
    return recipe


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.learning_rate=1e-4", 1e-4),
        ("train.learning_rate=1", 1.0),
        ("train.learning_rate = 3e-4", 3e-4),
        ("train.batch_size=16", 16),
        ("train.gradient_checkpointing=true", True),
        ("train.report_to=[wandb, tensorboard]", ["wandb", "tensorboard"]),
        ("train.report_to=[]", []),
        ("model.name_or_path=123", "123"),
        ("model.revision=123", "123"),
        ("model.revision=1e5", "1e5"),
        ("model.revision=true", "true"),
        ("model.revision='null'", "null"),
        ("model.revision=null", None),
        ("model.revision=", None),
        ("model.revision=a=b", "a=b"),
        ("data.columns={messages: turns}", {"messages": "turns"}),
        ("data.columns.messages=turns", {"messages": "turns"}),
        ("data.template=Q: {q} #1", "Q: {q} #1"),
        ("data.template={prompt}", "{prompt}"),
        ("data.template={prompt}: {input}", "{prompt}: {input}"),
        ("data.template=[INST] {prompt}", "[INST] {prompt}"),
        ("data.template='it''s'", "it's"),
        ("data.template=\"a\" b", '"a" b'),
        ("method.target_modules=[q_proj, 1]", ["q_proj", "1"]),
        ("method.target_modules=12", "12"),
        ("method.extra={a: [1, 2e-5], b: null}", {"a": [1, 2e-5], "b": None}),
        ("eval.rows=5", 5),
    ],
)  # fmt: skip
def test_values_are_typed_by_the_schema(here, override, value):
    found = get(read(GOOD, override), override.partition("=")[0].strip().replace(".messages", ""))
    assert found == value
    assert type(found) is type(value)


def test_variables_are_read_in_overrides(here, monkeypatch):
    monkeypatch.setenv("RATE", "3e-5")
    recipe = read(GOOD, "train.learning_rate=${RATE}", "data.template={q} ${RATE}", "model.revision=$${RATE}")
    assert (recipe.train.learning_rate, recipe.data.template, recipe.model.revision) == (3e-5, "{q} 3e-5", "${RATE}")


def test_null_returns_to_the_default(here):
    assert read(GOOD, "train.learning_rate=null", "method.r=").train.learning_rate == 2e-4
    assert read(GOOD, "method.r=~").method.r == 8
    assert read(GOOD, "eval=null").eval.rows is None
    assert read(GOOD + "  lr: 3\n", "train.lr=null").method.r == 4


def test_null_of_a_required_key_is_an_error(here):
    assert problems(GOOD, "train.output_dir=null", "model=null", "method.name=") == [
        "command line: train.output_dir: required key is missing; add it under `train:`",
        "command line: model: required section is missing; add `model:`",
        "command line: method.name: required key is missing; known: lora, prompt",
    ]


def test_the_last_override_of_a_key_wins(here):
    assert read(GOOD, "train.seed=1", "train.seed=2").train.seed == 2
    assert read(GOOD, "train.seed=1", "train.seed=null").train.seed == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seed", "command line: train.seed: expected KEY=VALUE with a dotted KEY, got 'train.seed'; write it like train.learning_rate=1e-4"),
        ("=3", "command line: =3: expected KEY=VALUE with a dotted KEY, got '=3'; write it like train.learning_rate=1e-4"),
        ("train..seed=3", "command line: train..seed: expected KEY=VALUE with a dotted KEY, got 'train..seed=3'; write it like train.learning_rate=1e-4"),
        ("--train.seed=3", "command line: --train.seed: expected KEY=VALUE with a dotted KEY, got '--train.seed=3'; write it like train.learning_rate=1e-4"),
        ("train.output_dir.x=3", "command line: train.output_dir.x: train.output_dir is a value, not a section; set train.output_dir itself"),
        ("data.train.0.x=3", "command line: data.train.0.x: data.train is a value, not a section; set data.train itself"),
        ("train.sed=3", "command line: train.sed: unknown key; did you mean 'seed'?"),
        ("train.sed=null", "command line: train.sed: unknown key; did you mean 'seed'?"),
        ("trian.seed=3", "command line: trian.seed: trian: unknown key; did you mean 'train'?"),
        ("train.seed=x", 'command line: train.seed: expected an integer, got text "x"'),
        ("train.learning_rate='0.1'", 'command line: train.learning_rate: expected a number, got text "0.1"; remove the quotes'),
        ("data.train=[a", "command line: data.train: not YAML: found a list that is not closed; put the value in quotes"),
        ("train.seed={a", "command line: train.seed: not YAML: found a mapping that is not closed; put the value in quotes"),
        ("method=lora", 'command line: method: expected a section, got text "lora"; write `name: lora`, indented, below `method:`'),
        ("eval='a", "command line: eval: expected a section, got text \"'a\"; write its keys, indented, below `eval:`"),
        ("train.seed=${NOPE}", "command line: train.seed: environment variable NOPE is not set; set it, or write ${NOPE:-default}"),
        ("data.template={a} ${NOPE}", "command line: data.template: environment variable NOPE is not set; set it, or write ${NOPE:-default}"),
        ("model.revision=a\0b", "command line: model.revision: a character that no text may hold (NUL or half a surrogate pair); remove it"),
    ],
)  # fmt: skip
def test_overrides_that_can_t_work(here, override, message):
    assert problems(GOOD, override) == [message]


def test_another_method_drops_nothing_silently(here):
    assert problems(GOOD, "method.name=prompt") == [
        "x.yaml:4:1: method.tokens: required key is missing; add it under `method:`",
        "x.yaml:6:3: method.r: unknown key; known: name, tokens",
    ]
    recipe = read(GOOD, "method={name: prompt, tokens: 3}")
    assert recipe.method.tokens == 3


def test_a_key_on_the_command_line_displaces_the_file_s_rival(here):
    recipe = read(GOOD + "  epochs: 2\n  warmup_ratio: 0.1\n", "train.max_steps=5", "train.warmup_steps=1")
    assert (recipe.train.max_steps, recipe.train.epochs) == (5, 1.0)
    assert (recipe.train.warmup_steps, recipe.train.warmup_ratio) == (1, None)
    assert problems(GOOD, "train.max_steps=5", "train.epochs=2") == [
        "command line: train.epochs: contradicts train.max_steps, which is set too; keep one of the two"
    ]


def test_unsetting_displaces_nothing(here):
    assert read(GOOD + "  epochs: 2\n", "train.max_steps=null").train.epochs == 2.0


def test_overrides_are_checked_with_a_value_that_keeps_its_text(here):
    assert read(GOOD, "eval.metrics=[regex]", "eval.pattern=42").eval.pattern == "42"
