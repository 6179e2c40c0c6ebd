"""Classifiers from a recipe to an answer: train, read back with their labels, merge, evaluate, look, refuse."""

import json
import shutil

import pytest
import torch
import transformers
from peft import PeftModel

import peftctl
from peftctl.artifacts.checks import probe_logits
from peftctl.commands.chat import open_session
from peftctl.commands.check import check
from peftctl.commands.export import export
from peftctl.commands.model import inspect
from peftctl.commands.model_change import change
from peftctl.commands.model_recipe import trained_shapes
from peftctl.errors import DataError, PeftctlError, UsageError
from tests.commands.helpers import write_recipe
from tests.tiny import save_tiny, tiny_bert, tiny_llama, tiny_opt, tiny_t5

LORA = {"name": "lora", "r": 4, "target_modules": "attention"}
CASES = {
    "bert-texts-lora": ("bert", "seq_cls", LORA),
    "bert-texts-full": ("bert", "seq_cls", {"name": "full"}),
    "bert-texts-bitfit": ("bert", "seq_cls", {"name": "bitfit"}),
    "bert-words-lora": ("bert", "token_cls", LORA),
    "bert-words-bitfit": ("bert", "token_cls", {"name": "bitfit"}),
    "llama-texts-lora": ("llama", "seq_cls", LORA),
    "llama-words-full": ("llama", "token_cls", {"name": "full"}),
    "opt-texts-bitfit": ("opt", "seq_cls", {"name": "bitfit"}),
}
RATES = {"lora": 0.02, "full": 0.003, "bitfit": 0.05}
ADAPTERS = [name for name, (_, _, method) in CASES.items() if method["name"] != "full"]
LABELS = {"seq_cls": ["high", "low", "odd"], "token_cls": ["B-NUM", "I-NUM", "O"]}
AUTO = {"seq_cls": "AutoModelForSequenceClassification", "token_cls": "AutoModelForTokenClassification"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    made = {"bert": tiny_bert(), "llama": tiny_llama(), "opt": tiny_opt(), "t5": tiny_t5()}
    return {name: save_tiny(folder / name, model, template=None) for name, model in made.items()}


def texts(numbers):
    names = LABELS["seq_cls"]
    return [{"text": f"answer {names[i % 3]} {'a' * (i % 5)} {i}", "label": names[i % 3]} for i in numbers]


def words(numbers):
    return [
        {"tokens": ["book", *["table"] * (i % 3), str(i), "8"], "tags": ["O", *["O"] * (i % 3), "B-NUM", "I-NUM"]}
        for i in numbers
    ]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def recipe(folder, base, task="seq_cls", method=None, model=None, data=None, **sections):
    fmt = "labelled_text" if task == "seq_cls" else "tokens_tags"
    path = write_recipe(
        folder, base, method=method or LORA, model={"task": task, **(model or {})},
        data={"format": fmt, "max_length": 24, **(data or {})}, **sections,
    )  # fmt: skip
    make = texts if task == "seq_cls" else words
    write(folder / "train.jsonl", make(range(10, 34)))
    write(folder / "eval.jsonl", make(range(40, 47)))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, bases):
    """Every case trained once, when it is asked for."""
    done = {}

    def run(case):
        if case not in done:
            architecture, task, method = CASES[case]
            path = recipe(
                tmp_path_factory.mktemp(case), bases[architecture], task, method,
                train={"max_steps": 14, "eval_steps": 7, "learning_rate": RATES[method["name"]]},
            )  # fmt: skip
            done[case] = peftctl.train(peftctl.load_recipe(path))
        return done[case]

    return run


@pytest.mark.parametrize("case", CASES)
def test_training_learns_and_what_is_saved_is_read_back(runs, case):
    """`train` itself compares the logits of what it reads back."""
    run, task = runs(case), CASES[case][1]
    before, after = run.summary["eval"]["before"], run.summary["eval"]["after"]
    assert list(after) == ["loss", "accuracy", "macro_f1" if task == "seq_cls" else "entity_f1"]
    assert after["loss"] < 0.8 * before["loss"]
    lines = [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]
    halfway = [line for line in lines if "eval_loss" in line]
    assert halfway and {"eval_accuracy", "eval_macro_f1"} <= halfway[0].keys() and "eval_perplexity" not in halfway[0]
    model, _ = peftctl.load(run.run)
    assert model.config.id2label == dict(enumerate(LABELS[task]))
    assert model.config.label2id == {name: i for i, name in enumerate(LABELS[task])}
    evaluated = json.loads((run.run / "eval.json").read_text())
    assert evaluated["metrics"] == pytest.approx(after)
    assert evaluated["samples"][0].keys() == {"where", "text", "reference", "prediction"}
    assert peftctl.load_recipe(run.run / "recipe.yaml").data.labels == LABELS[task]
    assert peftctl.evaluate(str(run.run)).metrics == pytest.approx(after)


@pytest.mark.parametrize("case", ADAPTERS)
def test_plain_libraries_load_the_adapter(runs, bases, case):
    architecture, task, _ = CASES[case]
    adapter = runs(case).artefact
    torch.manual_seed(99)  # another head than training drew
    base = getattr(transformers, AUTO[task]).from_pretrained(bases[architecture], num_labels=3, pad_token_id=3)
    plain = PeftModel.from_pretrained(base, str(adapter)).eval()
    ours, _ = peftctl.load(adapter)
    rows = [[5, 6, 7, 8], [9, 10, 11]]
    torch.testing.assert_close(probe_logits(plain, rows), probe_logits(ours, rows), rtol=0, atol=0)
    card = (adapter / "README.md").read_text()
    assert AUTO[task] in card and "id2label" in card and "peftctl chat" not in card


@pytest.mark.parametrize("case", ["bert-texts-lora", "bert-words-bitfit", "llama-texts-lora"])
def test_an_adapter_without_our_record_loads_with_as_many_classes(runs, tmp_path, case):
    copied = tmp_path / "adapter"
    shutil.copytree(runs(case).artefact, copied)
    (copied / "peftctl.json").unlink()
    model, _ = peftctl.load(copied)
    ours, _ = peftctl.load(runs(case).artefact)
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert torch.equal(probe_logits(model, [[5, 6, 7]]), probe_logits(ours, [[5, 6, 7]]))


@pytest.mark.parametrize("case", ["bert-texts-lora", "bert-words-lora", "bert-texts-bitfit", "llama-texts-lora"])
def test_a_merged_model_keeps_labels_and_answers(runs, tmp_path, case):
    run, task = runs(case), CASES[case][1]
    peftctl.merge(str(run.run), tmp_path / "merged")
    plain = getattr(transformers, AUTO[task]).from_pretrained(tmp_path / "merged")
    assert plain.config.id2label == dict(enumerate(LABELS[task]))
    ours, _ = peftctl.load(run.run)
    rows = [[5, 6, 7, 8], [9, 10, 11]]
    torch.testing.assert_close(probe_logits(plain, rows), probe_logits(ours, rows), rtol=1e-5, atol=1e-5)
    after = run.summary["eval"]["after"]
    measured = peftctl.evaluate(str(tmp_path / "merged"), recipe=str(run.run / "recipe.yaml"))
    assert measured.metrics == pytest.approx(after, rel=1e-4)
    (tmp_path / "merged" / "peftctl.json").unlink()
    again, _ = peftctl.load(tmp_path / "merged")
    assert type(again) is type(plain)


def test_a_decoder_reads_the_class_off_the_last_token_that_is_no_padding(runs):
    run = runs("llama-texts-lora")
    model, tokenizer = peftctl.load(run.run)
    rows = ["answer high", "answer low aaaa aaaa"]
    together = tokenizer(rows, padding=True, return_tensors="pt")
    assert (together.attention_mask == 0).any()
    with torch.no_grad():
        batch = model(**together).logits
        alone = torch.cat([model(**tokenizer(row, return_tensors="pt")).logits for row in rows])
    torch.testing.assert_close(batch, alone, rtol=1e-4, atol=1e-4)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(bases, tmp_path):
    from peftctl.errors import Interrupted
    from tests.training.test_resume import StopAt

    results = []
    for name, stop in (("straight", None), ("stopped", 3)):
        (tmp_path / name).mkdir()
        wanted = peftctl.load_recipe(recipe(tmp_path / name, bases["bert"], train={"max_steps": 6}))
        if stop is None:
            done = peftctl.train(wanted)
        else:
            with pytest.raises(Interrupted):
                peftctl.train(wanted, reporter=StopAt(stop))
            done = peftctl.train(wanted, resume=True)
        results.append(probe_logits(peftctl.load(done.run)[0], [[5, 6, 7]]))
    assert torch.equal(*results)


@pytest.mark.parametrize(("task", "method"), [("seq_cls", "lora"), ("token_cls", "bitfit"), ("seq_cls", "full")])
def test_half_types_train(bases, tmp_path, task, method):
    own = LORA if method == "lora" else {"name": method}
    path = recipe(
        tmp_path, bases["bert"], task, own, model={"dtype": "bfloat16"}, train={"learning_rate": RATES[method]}
    )
    run = peftctl.train(peftctl.load_recipe(path))
    assert run.summary["eval"]["after"]["loss"] < run.summary["eval"]["before"]["loss"]
    assert peftctl.load(run.run)[0].dtype == torch.bfloat16


def test_weights_of_another_head_are_not_taken_for_damage(tmp_path):
    """A base that is a classifier of other classes lends its backbone."""
    base = save_tiny(tmp_path / "base", tiny_bert(kind="BertForSequenceClassification", num_labels=5), template=None)
    run = peftctl.train(peftctl.load_recipe(recipe(tmp_path, base)))
    assert peftctl.load(run.run)[0].config.num_labels == 3


def test_an_adapter_on_a_merged_classifier(bases, tmp_path):
    """model.adapters: the first run's head is in the base of the second."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    first = peftctl.train(peftctl.load_recipe(recipe(folders[0], bases["bert"])))
    path = recipe(folders[1], bases["bert"], model={"adapters": [str(first.run)]})
    second = peftctl.train(peftctl.load_recipe(path))
    before, after = (first.summary["eval"]["after"], second.summary["eval"]["before"])
    assert after == pytest.approx(before, rel=1e-3)
    assert peftctl.load(second.run)[0].config.id2label == dict(enumerate(LABELS["seq_cls"]))


@pytest.mark.parametrize("task", ["seq_cls", "token_cls"])
def test_check_shows_rows_with_their_classes(bases, tmp_path, task):
    report = check(peftctl.load_recipe(recipe(tmp_path, bases["bert"], task)), preview_rows=2)
    assert sum(report.supervision["training"].classes.values()) == report.supervision["training"].supervised_tokens
    assert report.plan.traced and report.plan.total > 0
    assert report.rows[0].keys() == {"input_ids", "labels"}
    assert "labels:" in report.recipe_yaml
    shown = "".join(text for text, supervised in report.previews[0] if supervised)
    assert shown == ("low" if task == "seq_cls" else "book table 1 8")  # the 0 of 10 is the word's second piece


@pytest.mark.parametrize("architecture", ["bert", "llama", "opt"])
@pytest.mark.parametrize("task", ["seq_cls", "token_cls"])
def test_plans_are_counted_and_not_estimated(bases, tmp_path, architecture, task):
    if (architecture, task) == ("opt", "token_cls"):  # the library has no such class
        with pytest.raises(UsageError, match="AutoModelForTokenClassification"):
            check(peftctl.load_recipe(recipe(tmp_path, bases[architecture], task)))
        return
    assert check(peftctl.load_recipe(recipe(tmp_path, bases[architecture], task))).plan.traced


def test_the_model_command_looks_at_classifiers(runs, bases, tmp_path):
    run = runs("bert-texts-lora")
    for target in (run.run, run.artefact, runs("bert-texts-full").run):
        assert inspect(str(target)).tables
    assert change(str(run.run), str(runs("bert-texts-full").run)).tables
    model, _ = trained_shapes(peftctl.load_recipe(recipe(tmp_path, bases["bert"])))
    assert any("classifier" in name and p.requires_grad for name, p in model.named_parameters())


def test_chat_and_other_formats_are_refused_in_one_line(runs, tmp_path):
    run = runs("bert-texts-lora")
    with pytest.raises(UsageError, match=r"is a classifier \(seq_cls\), which writes no text; measure it with"):
        open_session(str(run.run))
    with pytest.raises(UsageError, match="takes causal_lm models, this one is for seq_cls"):
        export(str(run.run), tmp_path / "out", format="ollama")
    with pytest.raises(UsageError, match="its base has no head for these classes"):
        peftctl.evaluate(str(run.run), with_base=True)


def test_an_export_for_the_hub_says_how_to_load_it(runs, tmp_path):
    export(str(runs("bert-words-lora").run), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForTokenClassification" in card and "I-NUM" in card and "peftctl chat" not in card


def test_a_recipe_of_another_task_is_refused_in_evaluation(runs, bases, tmp_path):
    other = recipe(tmp_path, bases["bert"], "token_cls")
    with pytest.raises(UsageError, match=r"is a seq_cls, and the recipe has model.task token_cls"):
        peftctl.evaluate(str(runs("bert-texts-lora").run), recipe=str(other))


def test_evaluation_counts_by_the_models_own_order(runs, bases, tmp_path):
    """Another recipe without labels, or with another order, does not renumber the model's."""
    run = runs("bert-texts-lora")
    other = recipe(tmp_path, bases["bert"], data={"labels": ["odd", "low", "high"]})
    assert peftctl.evaluate(str(run.run), recipe=str(other)).metrics == pytest.approx(run.summary["eval"]["after"])
    write(tmp_path / "eval.jsonl", [{"text": "x", "label": "sing"}])
    with pytest.raises(DataError, match="label 'sing' is not one of high, low, odd"):
        peftctl.evaluate(str(run.run), recipe=str(other))


def test_a_method_that_names_no_classes_is_refused(bases, tmp_path):
    path = recipe(tmp_path, bases["llama"], method={"name": "last_layers"})
    with pytest.raises(UsageError, match=r"model.task: last_layers does not do seq_cls"):
        peftctl.train(peftctl.load_recipe(path))


def broken(path, overrides=()):
    with pytest.raises(PeftctlError) as caught:
        check(peftctl.load_recipe(path, overrides))
    return str(caught.value)


def test_every_wrong_recipe_is_one_line_with_its_place(bases, tmp_path):
    path = recipe(tmp_path, bases["bert"])
    assert "data.format: tokens_tags does not fit model.task seq_cls" in broken(path, ["data.format=tokens_tags"])
    assert "data.template: format labelled_text does not read it" in broken(path, ["data.template=alpaca"])
    assert "data.loss_on: format labelled_text does not read it" in broken(path, ["data.loss_on=all"])
    assert "eval.metrics: perplexity does not fit model.task seq_cls" in broken(path, ["eval.metrics=[perplexity]"])
    assert "eval.metrics: entity_f1 does not fit model.task seq_cls" in broken(path, ["eval.metrics=[entity_f1]"])
    assert "data.labels: high twice" in broken(path, ["data.labels=[high,low,high]"])
    assert "data.labels: expected" in broken(path, ["data.labels=[high]"])
    assert "label 'odd' is not one of high, low" in broken(path, ["data.labels=[high,low]"])
    language = ["model.task=causal_lm", "data.format=text"]
    assert "data.labels: causal_lm has no classes" in broken(path, [*language, "data.labels=[a,b]"])
    assert "eval.metrics: accuracy does not fit model.task causal_lm" in broken(
        path, [*language, "eval.metrics=[accuracy]"]
    )


def test_entity_f1_needs_tags_and_says_so_before_anything_loads(bases, tmp_path):
    path = recipe(tmp_path, bases["bert"], "token_cls", eval={"metrics": ["entity_f1"]})
    for name in ("train", "eval"):
        write(tmp_path / f"{name}.jsonl", [{"tokens": ["a", "b"], "tags": ["DET", "NOUN"]}])
    assert "eval.metrics: entity_f1 needs BIO tags" in broken(path)


def test_the_order_of_the_recipe_is_the_order_of_the_head(bases, tmp_path):
    path = recipe(tmp_path, bases["bert"], data={"labels": ["odd", "low", "high", "none"]}, train={"max_steps": 1})
    model, _ = peftctl.load(peftctl.train(peftctl.load_recipe(path)).run)
    assert model.config.id2label == {0: "odd", 1: "low", 2: "high", 3: "none"}


def test_numbers_as_labels(bases, tmp_path):
    path = recipe(tmp_path, bases["bert"], train={"max_steps": 1})
    for name in ("train", "eval"):
        write(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}", "label": i % 3} for i in range(6)])
    run = peftctl.train(peftctl.load_recipe(path))
    assert peftctl.load_recipe(run.run / "recipe.yaml").data.labels == ["0", "1", "2"]
    assert peftctl.evaluate(str(run.run)).metrics.keys() == {"loss", "accuracy", "macro_f1"}


def test_no_such_class_for_the_model_is_one_line(bases, tmp_path):
    """OPT has no class that tags words."""
    assert "AutoModelForTokenClassification" in broken(recipe(tmp_path, bases["opt"], "token_cls"))
    assert "\n" not in broken(recipe(tmp_path, bases["opt"], "token_cls"))
