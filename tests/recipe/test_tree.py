import math

import pytest

from peftctl.errors import RecipeError
from peftctl.recipe.nodes import BROKEN, Table, find, key_place, plain
from peftctl.recipe.tree import MAX_VALUES, parse, resolve_scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1e-4", 1e-4),
        ("3e5", 3e5),
        ("1E+3", 1e3),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0.25", -0.25),
        ("+1.5e3", 1500.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("0", 0),
        ("-3", -3),
        ("+12", 12),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
    ],
)
def test_scalars_with_a_type(text, value):
    found = resolve_scalar(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "yes",
        "no",
        "on",
        "off",
        "Yes",
        "NO",
        "y",
        "n",
        "1_000",
        "007",
        "-01",
        "0x10",
        "0o7",
        "0b1",
        "1e",
        "1e5x",
        "e5",
        ".",
        ".e5",
        "1.2.3",
        "12:30",
        "2024-01-01",
        "tRUE",
        "nULL",
        "inf",
        "nan",
    ],
)
def test_scalars_that_stay_text(text):
    assert resolve_scalar(text) == text


def test_nan_is_read():
    assert math.isnan(resolve_scalar(".nan"))


def test_integers_beyond_python_s_limit_do_not_raise():
    assert resolve_scalar("9" * 5000) == math.inf


def test_every_key_and_value_has_its_place():
    root, findings = parse("a:\n  b: 1\n  c: [x, 'y']\n", "r.yaml")
    assert isinstance(root, Table)
    assert not findings
    assert plain(root) == {"a": {"b": 1, "c": ["x", "y"]}}
    assert key_place(root, ("a", "b")).text == "r.yaml:2:3"
    assert find(root, ("a", "b")).place.text == "r.yaml:2:6"
    assert find(root, ("a", "c", 1)).place.text == "r.yaml:3:10"
    assert key_place(root, ("a", "c", 1)).text == "r.yaml:3:10"
    assert key_place(root, ("a", "nowhere", "x")).text == "r.yaml:1:1"


def test_quotes_and_blocks_keep_text():
    root, _ = parse("a: '1'\nb: \"true\"\nc: |\n  2\nd: null\n", "r.yaml")
    assert plain(root) == {"a": "1", "b": "true", "c": "2\n", "d": None}


def test_keys_are_never_typed():
    root, _ = parse("on: 1\n1: 2\nnull: 3\n", "r.yaml")
    assert plain(root) == {"on": 1, "1": 2, "null": 3}


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "~"])
def test_no_content(text):
    assert parse(text, "r.yaml") == (None, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n\t- x", "r.yaml:3:1: not YAML: found a tab; indent with spaces"),
        (
            "a: b: c",
            "r.yaml:1:5: not YAML: found a ':' that does not belong here; indent it right, or quote the text",
        ),
        (
            "x: 1\na: [1, 2\nb: 3",
            "r.yaml:2:4: not YAML: found a list that is not closed; add ']', or quote texts that hold [ ] { } or ,",
        ),
        (
            "a: {x\n",
            "r.yaml:1:4: not YAML: found a mapping that is not closed; add '}', or quote texts that hold [ ] { } or ,",
        ),
        ("a: 'x\n", "r.yaml:1:4: not YAML: found a quote that is not closed; close the quote"),
        ("a: 1\nword\nb: 2", "r.yaml:2:1: not YAML: found a key without ':'; write `key: value`"),
        ('a: "\\q"', "r.yaml:1:6: not YAML: found an unknown escape in double quotes; use single quotes"),
        ('a: "\\UFFFFFFFF"', "r.yaml:1:7: not YAML: found an escape that is no character; use single quotes"),
        ('a: "\\xg"', "r.yaml:1:7: not YAML: found an unknown escape in double quotes; use single quotes"),
        (
            "{a: 1}\nb: 1",
            "r.yaml:2:1: not YAML: found text that fits no line above; check the indentation and the quotes",
        ),
        ("a: ]", "r.yaml:1:4: not YAML: found a sign where a value should stand; quote the text"),
        ("a: - b", "r.yaml:1:4: not YAML: found a '-' that begins no list element; put lists below their key"),
        ("a: ? b", "r.yaml:1:4: not YAML: found a '?' that begins no key; quote the text"),
        ("a: |x", "r.yaml:1:5: not YAML: found text behind '|' or '>'; quote the text, or begin it on the next line"),
        ("a: *", "r.yaml:1:5: not YAML: found a '*' or '&' without a name; quote the text"),
        (
            "%YAML x\n---\na: 1",
            "r.yaml:1:7: not YAML: expected a digit, but found 'x'; check the line and the one above it",
        ),
        ("a: @x", "r.yaml:1:4: not YAML: found a character that can't begin a value; quote the text"),
        ("a: 1\nb: \x01", "r.yaml:2:4: a control character (code 1) in the text; remove it"),
        ("a: 1\n---\nb: 1", "r.yaml:2:1: a second document; a recipe is one document; remove '---' and what follows"),
        ("? [a]\n: 1", "r.yaml:1:3: a key that is not plain text; write `key: value`"),
        ("a: *x", "r.yaml:1:4: alias '*x' has no anchor '&x' above it; write the value out"),
        ("a: &x [*x]", "r.yaml:1:8: alias '*x' stands inside its own anchor; write the value out"),
        ("a: " + "[" * 99, "r.yaml:1:36: nested deeper than 32 levels; a recipe needs three"),
    ],
)
def test_text_that_is_no_recipe(text, message):
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("a: 1\nb: 2\na: 3", "r.yaml:3:1", "key 'a' is set twice, first at r.yaml:1:1"),
        ("x:\n  <<: {a: 1}", "r.yaml:2:3", "merge key '<<'"),
        ("x: !!python/object:os.system y", "r.yaml:1:4", "YAML tag '!!python/object:os.system'"),
        ("x: !!str 1", "r.yaml:1:4", "YAML tag '!!str'"),
        ("x: !mine [1]", "r.yaml:1:4", "YAML tag '!mine'"),
        ('x: "a\\0b"', "r.yaml:1:4", "a character that no text may hold (NUL or half a surrogate pair)"),
        ('x: "\\ud800"', "r.yaml:1:4", "a character that no text may hold (NUL or half a surrogate pair)"),
        ("?\n: 1\n", "r.yaml:1:2", "a ':' without a key before it"),
    ],
)
def test_single_keys_and_values_that_are_refused(text, place, message):
    _, findings = parse(text, "r.yaml")
    assert [(finding.place.text, finding.message) for finding in findings] == [(place, message)]
    assert findings[0].hint


def test_aliases_are_read():
    root, findings = parse("a: &x [1, 2]\nb: *x\n", "r.yaml")
    assert plain(root) == {"a": [1, 2], "b": [1, 2]}
    assert not findings


def test_aliases_that_explode_are_refused():
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(RecipeError, match=f"more than {MAX_VALUES} values"):
        parse("\n".join(lines), "r.yaml")


def test_environment_variables(monkeypatch):
    monkeypatch.setenv("RATE", "2e-5")
    monkeypatch.setenv("EMPTY", "")
    text = "a: ${RATE}\nb: '${RATE}'\nc: x-${RATE}\nd: ${NOPE:-7}\ne: ${EMPTY:-x}\nf: $${RATE}\ng: $5\nh: ${EMPTY}\n"
    root, findings = parse(text, "r.yaml")
    expected = {"a": 2e-5, "b": "2e-5", "c": "x-2e-5", "d": 7, "e": "x", "f": "${RATE}", "g": "$5", "h": None}
    assert plain(root) == expected
    assert not findings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: ${NOPE}", "environment variable NOPE is not set"),
        ("a: 'x${1}'", "'${' without a variable's name and '}'"),
        ("a: ${NOPE", "'${' without a variable's name and '}'"),
    ],
)
def test_variables_that_can_t_be_read(text, message, monkeypatch):
    monkeypatch.delenv("NOPE", raising=False)
    root, findings = parse(text, "r.yaml")
    assert [(finding.place.text, finding.message) for finding in findings] == [("r.yaml:1:4", message)]
    assert find(root, ("a",)).value is BROKEN
