"""Whatever a recipe holds, it is read or refused with a RecipeError: never another exception."""

import random

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftctl.errors import RecipeError
from peftctl.recipe.loader import read_recipe
from peftctl.recipe.write import dump_recipe
from tests.recipe.fakes import METHODS, write

FULL = {
    "model": {"name_or_path": "org/tiny", "task": "causal_lm", "revision": "main"},
    "method": {
        "name": "lora",
        "r": 4,
        "alpha": 2.0,
        "target_modules": ["a", "b"],
        "warm": 0.5,
        "extra": {"a": [1, None]},
    },
    "data": {
        "train": ["rows.jsonl"],
        "eval": "held.jsonl",
        "columns": {"messages": "m"},
        "template": "{x}",
        "max_length": 64,
    },
    "train": {
        "output_dir": "runs/x",
        "epochs": 1.0,
        "learning_rate": 2e-4,
        "eval_steps": 5,
        "report_to": ["wandb"],
        "seed": 0,
    },
    "eval": {"metrics": ["loss", "regex"], "pattern": "a+", "rows": 5},
}
ODD = [
    None,
    True,
    0,
    -1,
    10**30,
    1.5,
    float("inf"),
    float("nan"),
    "",
    "x",
    "yes",
    "1",
    "${NOPE}",
    "${HOME}",
    "${",
    "a/b/c",
    "*",
    "(",
    "../..",
    "~",
    "x" * 300,
    "\0",
    "\ud800",
    "\x85",
    "🦜",
    [],
    {},
    [[]],
    ["", None],
    {"a": {"b": []}},
    "lora",
    "prompt",
    "text",
    "seq_cls",
]
LINES = [
    "<<: *a",
    "a: &a [*a]",
    "? x",
    "!!set {}",
    "- x",
    "\t",
    "---",
    "...",
    "%YAML 9",
    "{",
    "]",
    "'",
    "&a",
    "*a",
    ": :",
    '"\\x"',
    "|",
    ">-",
]


def mutate_tree(tree, rng):
    """Drop, rename, duplicate or retype one key or element somewhere."""
    spots = []

    def walk(value):
        for key in list(value if isinstance(value, dict) else range(len(value))):
            spots.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(tree)
    holder, key = rng.choice(spots)
    action = rng.choice(["drop", "odd", "rename", "swap", "wrap"])
    if action == "drop":
        del holder[key]
    elif action == "odd":
        holder[key] = rng.choice(ODD)
    elif action == "rename" and isinstance(holder, dict):
        holder[rng.choice(["", "name", "foo", "<<", "a.b", "learning_rate", "train", "${X}", str(key)[1:]])] = (
            holder.pop(key)
        )
    elif action == "swap":
        other, other_key = rng.choice(spots)
        holder[key] = rng.choice([str(holder[key]), [holder[key]], {"x": 1}]) if holder is other else str(other_key)
    else:
        holder[key] = rng.choice([[holder[key]], {str(key): holder[key]}])


def mutate_text(text, rng):
    """Damage the text: lines doubled, moved, indented, replaced; characters cut, replaced, inserted."""
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    action = rng.choice(["double", "drop", "indent", "odd", "cut", "byte", "insert"])
    if action == "double":
        lines.insert(rng.randrange(len(lines)), lines[at])
    elif action == "drop":
        del lines[at]
    elif action == "indent":
        lines[at] = rng.choice(["  ", "\t", " "]) + lines[at].lstrip() * rng.choice([1, 2])
    elif action == "odd":
        lines[at] = lines[at].split(":")[0] + ": " + rng.choice(LINES)
    elif action == "insert":
        lines.insert(at, rng.choice(LINES))
    text = "\n".join(lines)
    if action == "cut":
        return text[: rng.randrange(len(text))]
    if action == "byte":
        spot = rng.randrange(len(text))
        return text[:spot] + rng.choice("\0\x01\x85\ufeff\u2028:{}[]#&*!|>'\"%@`,?-$~\r\n\t é") + text[spot + 1 :]
    return text


def accepted_or_refused(source, overrides=()):
    """Read a recipe; whatever was accepted must be written and read again to the same."""
    write_to, folder = source
    path = write(folder, write_to)
    try:
        recipe = read_recipe(path, overrides, METHODS)
    except RecipeError as error:
        assert error.problems
        assert all(problem.where and problem.message for problem in error.problems)
        assert len(set(error.problems)) == len(error.problems)
        assert "object at 0x" not in str(error)
        return False
    dumped = dump_recipe(recipe, METHODS[recipe.method.name].unread)
    assert read_recipe(write(folder, dumped, "again.yaml"), (), METHODS) == recipe
    return True


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_mutated_recipes(here, seed):
    rng = random.Random(seed)
    tree = yaml.safe_load(yaml.safe_dump(FULL))
    for _ in range(rng.choice([0, 0, 1, 2])):
        mutate_tree(tree, rng)
    text = yaml.dump(tree, sort_keys=False, allow_unicode=True)
    for _ in range(rng.choice([0, 0, 1, 2])):
        text = mutate_text(text or "x", rng)
    accepted_or_refused((text.encode("utf-8", "surrogatepass"), here))


def test_what_is_mutated_is_good(here):
    assert accepted_or_refused((yaml.safe_dump(FULL), here))


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(noise=st.binary(max_size=60), head=st.booleans())
def test_random_bytes(here, noise, head):
    good = yaml.safe_dump(FULL).encode()
    accepted_or_refused((noise + good if head else good + noise, here))


KEYS = st.sampled_from(
    [
        "train.seed",
        "train",
        "method.name",
        "data.train",
        "data.columns.x",
        "model.revision",
        "eval.pattern",
        "x.y",
        "",
        ".",
    ]
)
VALUES = st.one_of(
    st.text(max_size=12), st.sampled_from([str(value) for value in ODD] + ["[a", "{a: b}", "'x'", '"', "null"])
)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(overrides=st.lists(st.tuples(KEYS, VALUES).map("=".join) | st.text(max_size=8), max_size=3))
def test_random_overrides(here, overrides):
    accepted_or_refused((yaml.safe_dump(FULL), here), overrides)


@pytest.mark.parametrize("key", ["train", "eval"])
def test_directories_that_can_t_be_listed_are_refused(here, key, monkeypatch):
    (here / "locked").mkdir()

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.listdir", refuse)
    path = write(here, yaml.safe_dump({**FULL, "data": {"train": "rows.jsonl", key: "locked"}}))
    with pytest.raises(RecipeError, match="'locked' can't be read \\(Permission denied\\)"):
        read_recipe(path, (), METHODS)
