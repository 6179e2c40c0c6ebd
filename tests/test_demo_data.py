"""The demo data is what its generator makes, and is as hard as it claims to be."""

import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = ROOT / "recipes" / "data"
SETS = ("requests", "intents", "slots", "rewrite")
INSTRUCTIONS = ("alpaca", "belle", "preferences")


def rows(name: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{name}_{split}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def generator(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import make_demo_data

    yield make_demo_data
    for name in [name for name in sys.modules if name.partition(".")[0] in {"demo_data", "make_demo_data"}]:
        del sys.modules[name]


def question(row: dict) -> str:
    user, assistant = row["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return user["content"]


def answer(row: dict) -> str:
    return row["messages"][1]["content"]


def leaves(value) -> list:
    """Values of a call, without its name, which is the schema's and not the request's."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() if key != "call" for leaf in leaves(inner)]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in leaves(inner)]
    return [] if value is None else [value]


def test_the_files_are_what_the_generator_makes(generator, tmp_path):
    generator.write(tmp_path)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(path.name for path in DATA.iterdir())
    for name in made:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), f"{name}: run scripts/make_demo_data.py"


def test_sizes():
    assert len(rows("requests", "train")) >= 1200
    assert len(rows("requests", "eval")) >= 200
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 1_000_000


@pytest.mark.parametrize("name", SETS)
def test_no_row_occurs_twice(name):
    everything = [json.dumps(next(iter(row.values()))) for split in ("train", "eval") for row in rows(name, split)]
    assert len(set(everything)) == len(everything)


def test_answers_are_compact_json_of_the_intents_shape():
    shapes: dict[str, set] = {}
    for row in rows("requests", "train") + rows("requests", "eval"):
        call = json.loads(answer(row))
        assert answer(row) == json.dumps(call, ensure_ascii=False, separators=(",", ":"))
        keys = json.dumps({key: sorted(v) if isinstance(v, dict) else key for key, v in call.items()})
        shapes.setdefault(call["call"], set()).add(keys)
        assert leaves(call)
    assert len(shapes) >= 5
    assert all(len(keys) == 1 for keys in shapes.values())  # what is not said is null, not missing


def test_answers_hold_what_the_issue_asks_for():
    calls = [json.loads(answer(row)) for row in rows("requests", "eval")]
    text = "\n".join(answer(row) for row in rows("requests", "eval"))
    assert re.search(r'"date":"\d\d-\d\d"', text)
    assert re.search(r'"time":"\d\d:\d\d"', text)
    assert re.search(r'"amount":"\d+\.\d\d (EUR|USD|GBP)"', text)
    assert sum(any(isinstance(value, dict) for value in call.values()) for call in calls) == len(calls)
    assert sum(call.get("not") is not None for call in calls) > 40


def test_no_evaluation_value_occurs_in_training():
    seen = {leaf for row in rows("requests", "train") for leaf in leaves(json.loads(answer(row)))}
    asked = {leaf for row in rows("requests", "eval") for leaf in leaves(json.loads(answer(row)))}
    assert len(asked) > 200
    assert not seen & asked


def test_a_fifth_of_the_evaluation_phrasings_is_unseen(generator):
    train = list(generator.requests("requests", "train", len(rows("requests", "train"))))
    asked = list(generator.requests("requests", "eval", len(rows("requests", "eval"))))
    assert [request.text for request in asked] == [question(row) for row in rows("requests", "eval")]
    known = {(request.intent.call, request.core) for request in train}
    unseen = [request for request in asked if (request.intent.call, request.core) not in known]
    assert len(unseen) == len(asked) / 5
    # In any order of values, too: the fixed words of an unseen phrasing stand in no training request.
    texts = "\n".join(question(row).lower() for row in rows("requests", "train"))
    for core in {request.core for request in unseen}:
        words = re.escape(core.lower())
        assert not re.search(re.sub(r"\\\{\w+\\\}", r"\\S.*?", words), texts), core


def test_phrasings_vary(generator):
    for intent in generator.INTENTS:
        assert len(intent.commands) + len(intent.statements) >= 24
    train = generator.requests("requests", "train", 1600)
    skeletons = Counter("".join("_" if name else text for text, name in request.pieces) for request in train)
    assert len(skeletons) > 1200


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+|[^\w\s]", text.lower()))


def test_copying_the_nearest_training_answer_scores_under_a_fifth():
    train = rows("requests", "train")
    bags = [words(question(row)) for row in train]
    frequency = Counter(word for bag in bags for word in bag)
    weight = {word: math.log(len(train) / count) for word, count in frequency.items()}
    total = [sum(map(weight.__getitem__, bag)) for bag in bags]

    asked = rows("requests", "eval")
    right = 0
    for row in asked:
        mine = words(question(row)) & weight.keys()
        whole = sum(map(weight.__getitem__, mine))
        shared = [sum(map(weight.__getitem__, mine & bag)) for bag in bags]
        nearest = max(range(len(bags)), key=lambda n: shared[n] / (whole + total[n] - shared[n]))
        right += answer(train[nearest]) == answer(row)
    assert right / len(asked) < 0.2


def test_small_sets_have_the_fields_of_their_formats():
    for split in ("train", "eval"):
        assert all(set(row) == {"text", "label"} for row in rows("intents", split))
        assert len({row["label"] for row in rows("intents", split)}) >= 4
        assert all(set(row) == {"prompt", "completion"} for row in rows("rewrite", split))
        for row in rows("slots", split):
            assert len(row["tokens"]) == len(row["tags"])
            assert any(tag != "O" for tag in row["tags"])
            before = "O"
            for tag in row["tags"]:
                assert not tag.startswith("I-") or before[2:] == tag[2:]
                before = tag


def test_slots_of_evaluation_are_unseen():
    def spans(split: str) -> set[str]:
        found = set()
        for row in rows("slots", split):
            text = " ".join(f"{tag}\0{token}" for token, tag in zip(row["tokens"], row["tags"], strict=True))
            found |= {re.sub(r"\S+\0", "", span) for span in re.findall(r"B-\w+\0\S+(?: I-\w+\0\S+)*", text)}
        return found

    # A number word can be a count in one set and an hour in the other, so only what is longer is compared.
    assert not {s for s in spans("train") & spans("eval") if " " in s}


def test_the_sentence_of_a_note_keeps_its_values():
    for row in rows("rewrite", "train"):
        assert row["completion"].endswith(".")
        for name, value in re.findall(r"(?:^|; )(\w+) ([^;]+)", row["prompt"]):
            if name not in {"date", "not", "with"}:
                assert value in row["completion"], row


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions_differ_and_have_answers(name):
    train, asked = rows(name, "train"), rows(name, "eval")
    texts = [json.dumps({key: value for key, value in row.items() if key != "id"}) for row in train + asked]
    assert len(set(texts)) == len(texts) >= 240
    optional = {"input"} if name == "alpaca" else set()
    assert all(value.strip() for row in train + asked for key, value in row.items() if key not in optional)
    assert not re.search(r"[\[\]{}]", "".join(text[1:-1] for text in texts)), "a template was not filled in"


def test_instruction_sets_have_the_fields_of_the_sets_that_they_stand_for():
    for split in ("train", "eval"):
        assert all(list(row) == ["instruction", "input", "output"] for row in rows("alpaca", split))
        assert 0 < sum(not row["input"] for row in rows("alpaca", split)) < len(rows("alpaca", split)) / 2
        assert all(list(row) == ["id", "input", "target"] for row in rows("belle", split))
        for row in rows("preferences", split):
            assert list(row) == ["prompt", "chosen", "rejected"]
            assert row["prompt"].startswith("\n\nHuman: ") and row["prompt"].endswith("\n\nAssistant:")
            assert row["chosen"].startswith(" ") and row["chosen"] != row["rejected"]
    ids = [row["id"] for split in ("train", "eval") for row in rows("belle", split)]
    assert len(set(ids)) == len(ids)


def test_a_chosen_answer_speaks_of_the_request_and_a_rejected_one_does_not_do_it(generator):
    for request, row in zip(generator.requests("preferences", "train", 210), rows("preferences", "train"), strict=True):
        told = [value.plain for name, value in request.said.items() if name != "not"]
        assert all(value.lower() in row["chosen"].lower() for value in told), row
        own = row["rejected"].replace(request.text, "")
        assert not any(value.lower() in own.lower() for value in told if len(value) > 2), row
