# ruff: noqa: E501 -- messages stand whole on a line, so that a search finds them
import subprocess
import sys
from pathlib import Path

import pytest

from peftctl.errors import RecipeError
from peftctl.recipe.loader import MAX_BYTES, MethodSchema, read_recipe
from tests.recipe.fakes import GOOD, METHODS, LoraConfig, problems, read, write

PROMPT = GOOD.replace("name: lora\n  r: 4", "name: prompt\n  tokens: 5").replace("  learning_rate: 2e-4\n", "")


def test_a_good_recipe(here):
    recipe = read(GOOD)
    assert recipe.method == LoraConfig(r=4)
    assert recipe.train.learning_rate == 2e-4
    assert recipe.train.epochs == 1.0
    assert recipe.data.train == str(here / "rows.jsonl")
    assert recipe.model.name_or_path == "org/tiny"
    assert recipe.eval.metrics is None  # the usual ones of the task


def test_integers_are_numbers_and_scalars_of_yaml_1_2(here):
    recipe = read(GOOD.replace("2e-4", "1") + "  weight_decay: 2e-5\n  seed: 3\n")
    assert recipe.train.learning_rate == 1.0
    assert recipe.train.weight_decay == 2e-5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  r: 4", "  alhpa: 4", "x.yaml:6:3: method.alhpa: unknown key; did you mean 'alpha'?"),
        ("  r: 4", "  learning_rate: 4", "x.yaml:6:3: method.learning_rate: unknown key; `learning_rate` belongs to `train`"),
        ("  r: 4", "  batch_size: 4", "x.yaml:6:3: method.batch_size: unknown key; `batch_size` belongs to `train` or `eval`"),
        ("  learning_rate: 2e-4", "  max_tokens_per_batch: 64", "x.yaml:11:3: train.max_tokens_per_batch: not needed: train.tokens_per_pass bounds what is in memory without changing the rows of a step; remove it"),
        ("model:", "max_lenght: 1\nmodel:", "x.yaml:2:1: max_lenght: unknown key; known: backend, data, eval, method, model, quantization, train"),
        ("model:", "evla: {}\nmodel:", "x.yaml:2:1: evla: unknown key; did you mean 'eval'?"),
        ("model:", "train.epochs: 1\nmodel:", "x.yaml:2:1: train.epochs: unknown key; write nested sections; dotted keys are for the command line"),
        ("  output_dir: runs/x", "  output_dir: runs/x\n  eval:\n    rows: 5", "x.yaml:11:3: train.eval: unknown key; `eval:` is a section; check its indentation"),
        ("2e-4", "abc", 'x.yaml:11:18: train.learning_rate: expected a number, got text "abc"'),
        ("2e-4", "'2e-4'", 'x.yaml:11:18: train.learning_rate: expected a number, got text "2e-4"; remove the quotes'),
        ("2e-4", "-1", "x.yaml:11:18: train.learning_rate: expected a number of at least 0, got -1"),
        ("2e-4", ".inf", "x.yaml:11:18: train.learning_rate: expected a finite number, got inf"),
        ("2e-4", "true", "x.yaml:11:18: train.learning_rate: expected a number, got true"),
        ("2e-4", "[1]", "x.yaml:11:18: train.learning_rate: expected a number, got a list; give one value"),
        ("2e-4", "{a: 1}", "x.yaml:11:18: train.learning_rate: expected a number, got a mapping"),
        ("2e-4", "", "x.yaml:11:17: train.learning_rate: expected a number, got nothing; give a value, or remove the key"),
        ("learning_rate: 2e-4", "batch_size: 0", "x.yaml:11:15: train.batch_size: expected an integer above 0, got 0"),
        ("learning_rate: 2e-4", "batch_size: 8.0", "x.yaml:11:15: train.batch_size: expected an integer, got 8.0; write 8"),
        ("learning_rate: 2e-4", "batch_size: 007", 'x.yaml:11:15: train.batch_size: expected an integer, got text "007"'),
        ("learning_rate: 2e-4", "seed: 5000000000", "x.yaml:11:9: train.seed: expected an integer of at least 0 and below 4294967296, got 5000000000"),
        ("learning_rate: 2e-4", "scheduler: cosin", 'x.yaml:11:14: train.scheduler: expected one of constant, linear, cosine, constant_with_warmup, got text "cosin"; did you mean \'cosine\'?'),
        ("learning_rate: 2e-4", "gradient_checkpointing: yes", 'x.yaml:11:27: train.gradient_checkpointing: expected true or false, got text "yes"; write true'),
        ("learning_rate: 2e-4", "report_to: wandb", 'x.yaml:11:14: train.report_to: expected a list, got text "wandb"; write [wandb]'),
        ("learning_rate: 2e-4", "report_to: [wandb, mlflow]", 'x.yaml:11:22: train.report_to[1]: expected one of tensorboard, wandb, got text "mlflow"'),
        ("org/tiny", "123", "x.yaml:3:17: model.name_or_path: expected text, got 123; put it in quotes"),
        ("rows.jsonl", "1.5", "x.yaml:8:10: data.train: expected text or a list of texts, got 1.5; put it in quotes"),
        ("rows.jsonl", "[rows.jsonl, 1, {}]", "x.yaml:8:23: data.train[1]: expected text, got 1; put it in quotes\nx.yaml:8:26: data.train[2]: expected text, got a mapping"),
        ("  r: 4", "  warm: 1.5", "x.yaml:6:9: method.warm: expected an integer above 0 or a number above 0 and below 1, got 1.5"),
        ("  r: 4", "  scope: every", 'x.yaml:6:10: method.scope: expected auto or an integer, got text "every"'),
        ("  r: 4", "  dropout: 0.9", "x.yaml:4:1: method: dropout 0.9 needs target_modules"),
        ("  train: rows.jsonl", "  format: messages", "x.yaml:7:1: data.train: required key is missing; add it under `data:`, or data.sources"),
        ("data:\n  train: rows.jsonl\n", "", "x.yaml:2:1: data: required section is missing; add `data:`"),
        ("  name: lora\n", "", "x.yaml:4:1: method.name: required key is missing; known: lora, prompt"),
        ("  name: lora", "  name: lroa", "x.yaml:5:9: method.name: unknown method 'lroa'; did you mean 'lora'?"),
        ("  name: lora\n  r: 4", "  lora", 'x.yaml:5:3: method: expected a section, got text "lora"; write `name: lora`, indented, below `method:`'),
        ("  name: lora\n  r: 4", "  - lora", "x.yaml:5:3: method: expected a section, got a list; write its keys, indented, below `method:`"),
        ("  name: lora", "  name: [lora]", "x.yaml:5:9: method.name: expected a method's name, got a list"),
        ("  r: 4", "  r: 4\n  r: 5", "x.yaml:7:3: key 'r' is set twice, first at x.yaml:6:3; remove one of the two"),
        ("  r: 4", "  r: ${NOPE}", "x.yaml:6:6: environment variable NOPE is not set; set it, or write ${NOPE:-default}"),
    ],
)  # fmt: skip
def test_one_problem_one_message(here, old, new, message, monkeypatch):
    monkeypatch.delenv("NOPE", raising=False)
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    assert "\n".join(problems(text)) == message


def test_all_problems_come_together_in_the_order_of_the_file(here):
    text = GOOD.replace("r: 4", "rank: 4").replace("org/tiny", "./nowhere").replace("2e-4", "fast")
    text = text.replace("rows.jsonl", "row.jsonl") + "  batch_size: 0\nfoo: 1\n"
    places = [line.split(": ")[0:2] for line in problems(text, "train.seed=-1", "eval.rows=x")]
    assert places == [
        ["x.yaml:3:17", "model.name_or_path"],
        ["x.yaml:6:3", "method.rank"],
        ["x.yaml:8:10", "data.train"],
        ["x.yaml:11:18", "train.learning_rate"],
        ["x.yaml:12:15", "train.batch_size"],
        ["x.yaml:13:1", "foo"],
        ["command line", "train.seed"],
        ["command line", "eval.rows"],
    ]


def test_an_unknown_method_leaves_its_section_alone(here):
    assert len(problems(GOOD.replace("name: lora\n  r: 4", "name: lroa\n  rank: x\n  foo: 1"))) == 1


def test_the_place_is_the_path_as_given(here):
    (here / "sub").mkdir()
    write(here / "sub", GOOD.replace("r: 4", "r: 0"))
    with pytest.raises(RecipeError, match=r"^\./sub/x\.yaml:6:6: method\.r: expected an integer above 0, got 0$"):
        read_recipe("./sub/x.yaml", (), METHODS)


def test_methods_imply_values_where_the_recipe_is_silent(here):
    recipe = read(PROMPT)
    assert (recipe.train.learning_rate, recipe.train.warmup_ratio, recipe.data.max_length) == (0.3, 0.06, 256)
    assert read(PROMPT + "  learning_rate: 0.1\n").train.learning_rate == 0.1
    assert read(PROMPT, "train.learning_rate=0.2").train.learning_rate == 0.2


def test_an_explicit_null_is_not_silence(here):
    recipe = read(PROMPT + "  warmup_ratio: null\n")
    assert recipe.train.warmup_ratio is None
    assert read(GOOD.replace("r: 4", "start: null")).method.start is None


def test_an_implied_value_gives_way_to_its_rival(here):
    recipe = read(PROMPT + "  warmup_steps: 3\n")
    assert (recipe.train.warmup_steps, recipe.train.warmup_ratio) == (3, None)


def test_a_method_that_implies_a_wrong_value_shows_it(here):
    methods = {"lora": MethodSchema(LoraConfig, {"train.batch_size": 0, "train.batchsize": 1})}
    write(here, GOOD)
    with pytest.raises(RecipeError) as caught:
        read_recipe("x.yaml", (), methods)
    assert [str(problem) for problem in caught.value.problems] == [
        "x.yaml:5:3: train.batch_size: expected an integer above 0, got 0",
        "x.yaml:5:3: train.batchsize: unknown key; did you mean 'batch_size'?",
    ]


def test_keys_that_the_method_does_not_read(here):
    text = PROMPT + "  weight_decay: 0.1\neval:\n  rows: 5\n"
    assert problems(text) == [
        "x.yaml:11:3: method 'prompt' does not read train.weight_decay; remove it",
        "x.yaml:13:3: method 'prompt' does not read eval.rows; remove it",
    ]
    assert problems(PROMPT, "train.weight_decay=0") == [
        "command line: train.weight_decay: method 'prompt' does not read train.weight_decay; remove it"
    ]
    read(PROMPT + "eval:\n  rows: null\n")


def test_empty_sections_count_as_left_out(here):
    assert read(GOOD + "eval:\nbackend:\n").backend.name == "single"
    assert problems(GOOD.replace("data:\n  train: rows.jsonl", "data:")) == [
        "x.yaml:7:1: data.train: required key is missing; add it under `data:`, or data.sources"
    ]


def test_variables_are_typed_by_the_schema(here, monkeypatch):
    monkeypatch.setenv("RATE", "3e-5")
    monkeypatch.setenv("COMMIT", "123")
    recipe = read(GOOD.replace("2e-4", "${RATE}").replace("org/tiny", "org/tiny\n  revision: ${COMMIT}"))
    assert recipe.train.learning_rate == 3e-5
    assert recipe.model.revision == "123"


def test_aliases_work_between_sections(here):
    recipe = read(GOOD + "  batch_size: &rows 4\neval:\n  batch_size: *rows\n")
    assert recipe.eval.batch_size == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.yaml:1:1: the recipe is empty; it needs sections: model:, quantization:, method:, data:, train:, backend:, eval:"),
        (b"# nothing\n", "x.yaml:1:1: the recipe is empty; it needs sections: model:, quantization:, method:, data:, train:, backend:, eval:"),
        (b"- a\n", "x.yaml:1:1: expected sections (model:, quantization:, method:, data:, train:, backend:, eval:), got a list; is it a recipe?"),
        (b"hello\n", 'x.yaml:1:1: expected sections (model:, quantization:, method:, data:, train:, backend:, eval:), got text "hello"; is it a recipe?'),
        (b"a: 1\nb: \xff\n", "x.yaml:2: expected UTF-8, got byte 0xff; save the file as UTF-8"),
        (b"#" * (MAX_BYTES + 1), "x.yaml: expected a recipe, got more than 1 MiB; is it a data file?"),
    ],
)  # fmt: skip
def test_files_that_are_no_recipe(here, content, message):
    write(here, content)
    with pytest.raises(RecipeError) as caught:
        read_recipe("x.yaml", (), METHODS)
    assert str(caught.value) == message


def test_a_byte_order_mark_and_crlf_do_no_harm(here):
    write(here, b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert read_recipe(Path("x.yaml"), (), METHODS).method.r == 4


def test_reading_recipes_imports_nothing_heavy():
    code = (
        "import sys, peftctl.recipe.loader, peftctl.recipe.write, peftctl.recipe.jsonschema\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'peft', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
