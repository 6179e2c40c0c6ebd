"""Encoder-decoders from a recipe to an answer: train, read back, merge, evaluate, chat."""

import json

import pytest
import torch
import yaml

import peftctl
from peftctl.artifacts.checks import probe_logits
from peftctl.commands.chat import open_session
from peftctl.errors import UsageError
from tests.commands.helpers import write_recipe
from tests.tiny import save_tiny, tiny_bart, tiny_t5

T5 = {
    "lora": {"name": "lora", "r": 4, "dropout": 0.1, "target_modules": ["q", "v"]},
    "adalora": {"name": "adalora", "init_r": 6, "target_r": 2, "delta_t": 1, "target_modules": ["q", "v"]},
    "full": {"name": "full"},
    "prefix": {"name": "prefix_tuning", "num_virtual_tokens": 4, "hidden": 8, "everywhere": True},
}
BART = {"lora": {"name": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}}
CASES = [("t5", name) for name in T5] + [("bart", name) for name in BART]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {
        "t5": save_tiny(folder / "t5", tiny_t5(), template=None),
        "bart": save_tiny(folder / "bart", tiny_bart(), template=None),
    }


def recipe(folder, base, method, **train):
    """A recipe on pairs of text; two numbers stand for each prompt's answer."""
    path = write_recipe(
        folder, base, method=method, model={"task": "seq2seq_lm"},
        data={"format": "prompt_completion", "template": "{prompt}", "max_length": 24},
        eval={"metrics": ["loss", "exact_match"], "max_new_tokens": 5}, train=train,
    )  # fmt: skip
    for name, numbers in (("train", range(24)), ("eval", range(100, 106))):
        rows = [{"prompt": f"answer with {i}", "completion": str(i)} for i in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, bases):
    """Every case trained once."""
    done = {}
    for architecture, name in CASES:
        folder = tmp_path_factory.mktemp(f"{architecture}-{name}")
        method = (T5 if architecture == "t5" else BART)[name]
        done[architecture, name] = peftctl.train(peftctl.load_recipe(recipe(folder, bases[architecture], method)))
    return done


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_training_learns_and_what_is_saved_is_read_back(runs, case):
    """`train` itself compares the logits of what it reads back."""
    summary = runs[case].summary
    assert summary["eval"]["after"]["loss"] < summary["eval"]["before"]["loss"]
    assert summary["steps"] == 6
    rows = [len(str(i)) for i in range(24)]
    assert summary["train_tokens"] > summary["supervised_tokens"] > sum(rows)
    model, tokenizer = peftctl.load(str(runs[case].run))
    assert model.config.is_encoder_decoder and not model.training
    assert torch.isfinite(probe_logits(model, [tokenizer("answer with 3").input_ids])).all()


@pytest.mark.parametrize("case", [case for case in CASES if "lora" in case[1]], ids="-".join)
def test_merged_runs_answer_and_measure_alike(runs, case, tmp_path):
    run = runs[case].run
    done = peftctl.merge(str(run), str(tmp_path / "merged"))
    assert done.layers == 12 and done.max_delta < 1e-4
    merged = peftctl.evaluate(str(tmp_path / "merged"), recipe=str(run / "recipe.yaml"))
    own = peftctl.evaluate(str(run), with_base=True)
    assert merged.metrics["loss"] == pytest.approx(own.metrics["loss"], rel=1e-4)
    assert own.base["loss"] == pytest.approx(runs[case].summary["eval"]["before"]["loss"], rel=1e-6)
    assert own.base["loss"] > own.metrics["loss"]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_chat_answers_what_evaluation_generates(runs, case):
    evaluated = peftctl.evaluate(str(runs[case].run))
    session = open_session(str(runs[case].run), max_new_tokens=5)
    for sample in evaluated.samples:
        assert session.answer(sample["prompt"]) == sample["prediction"]


def test_a_base_without_a_record_is_known_by_its_configuration(bases):
    for base in bases.values():
        model, _ = peftctl.load(str(base))
        assert model.config.is_encoder_decoder and "Conditional" in type(model).__name__
        assert isinstance(open_session(str(base), max_new_tokens=3).answer("Hi"), str)


def test_a_long_message_is_refused_only_where_there_are_no_positions(runs):
    long = "answer with 7 " * 40
    assert isinstance(open_session(str(runs["t5", "lora"].run), max_new_tokens=2).answer(long), str)
    with pytest.raises(UsageError, match=r"this message has .* only 64 positions"):
        open_session(str(runs["bart", "lora"].run), max_new_tokens=2).answer(long)


def test_alpaca_rows_and_conversations_train_too(tmp_path, bases):
    path = recipe(tmp_path, bases["t5"], T5["lora"])
    row = {"instruction": "answer", "input": "7", "output": "seven"}
    (tmp_path / "train.jsonl").write_text((json.dumps(row) + "\n") * 8)
    settings = [
        "data.format=alpaca",
        "data.template=alpaca",
        "data.eval=null",
        "train.max_steps=2",
        "data.max_length=99",
    ]
    assert peftctl.train(peftctl.load_recipe(path, settings)).summary["steps"] == 2
    chatty = save_tiny(tmp_path / "chatty", tiny_t5())
    write_recipe(tmp_path, chatty)  # rows of messages
    settings = [f"model.name_or_path={chatty}", "data.format=messages", "data.template=chat", "data.max_length=99"]
    settings.append(f"train.output_dir={tmp_path / 'chat'}")
    path.write_text(
        yaml.safe_dump(yaml.safe_load(path.read_text()) | {"model": {"name_or_path": "x", "dtype": "float32"}})
    )
    done = peftctl.train(peftctl.load_recipe(path, [*settings, "model.task=seq2seq_lm"]))
    session = open_session(str(done.run), max_new_tokens=3)
    assert session.frame is None and isinstance(session.answer("answer with 7"), str)


def test_check_shows_both_sides(tmp_path, bases):
    from peftctl.commands.check import check

    report = check(peftctl.load_recipe(recipe(tmp_path, bases["t5"], T5["adalora"])), preview_rows=1)
    (pieces,) = report.previews
    assert pieces == [("answer with 0\n", False), ("0<|im_end|>", True)]
    (row,) = report.rows
    assert row.keys() == {"input_ids", "labels"} and row["labels"][-1] == 2
    assert report.trainable == 12 * 6 * (32 + 32 + 1) and report.plan.total > 0


def test_a_method_for_decoders_only_is_refused(tmp_path, bases):
    path = recipe(tmp_path, bases["t5"], {"name": "last_layers"})
    with pytest.raises(UsageError, match=r"model\.task: last_layers does not do seq2seq_lm; it does: causal_lm"):
        peftctl.train(peftctl.load_recipe(path))
