"""lm-evaluation-harness: handed over where it is installed, refused in one line where not."""

import importlib.util
import json

import pytest
import torch
import yaml

from peftctl import cli
from peftctl.errors import UsageError
from peftctl.evaluation import harness
from tests.tiny import tiny_llama, tiny_tokenizer

installed = importlib.util.find_spec("lm_eval") is not None
needs_harness = [
    pytest.mark.skipif(not installed, reason="lm-eval is not installed"),
    pytest.mark.filterwarnings("ignore"),  # what its own dependencies warn of
]
ROWS = [{"question": f"number {i}?", "choices": ["one", "two", "three"], "label": i % 3} for i in range(6)]


@pytest.fixture
def task(tmp_path):
    """A multiple-choice task of six rows, whose data lie beside its file."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    content = {
        "task": "numbers", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / "numbers.yaml").write_text(yaml.safe_dump(content))
    return folder / "numbers.yaml"


@pytest.fixture
def without_harness(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )


def test_what_is_not_installed_is_one_line_with_the_command(without_harness, capsys, tiny_dir):
    with pytest.raises(UsageError, match=r"pip install 'peftctl\[lm-eval\]'"):
        harness.require_harness()
    assert cli.run(["eval", str(tiny_dir), "--tasks", "hellaswag"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "pip install 'peftctl[lm-eval]'" in lines[0]


def test_files_beside_a_task_are_found(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    found = harness._with_local_files(
        {"dataset_kwargs": {"data_files": {"test": "rows.jsonl", "train": ["rows.jsonl", "hf://x"]}, "name": "n"}},
        tmp_path,
    )
    here = str(tmp_path / "rows.jsonl")
    assert found["dataset_kwargs"] == {"data_files": {"test": here, "train": [here, "hf://x"]}, "name": "n"}
    assert harness._with_local_files({"task": "x"}, tmp_path) == {"task": "x"}


def test_only_metrics_are_kept():
    values = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": "N/A", "exact_match,strict": 1, "sample_len": 6}
    assert harness._figures(values) == {"acc": 0.5, "exact_match,strict": 1.0}


def choice_scores(model, tokenizer):
    """Return log p(choice | question) of every row, naively: one forward a choice."""
    scores = []
    for row in ROWS:
        prompt = f"Question: {row['question']}\nAnswer:"
        before = tokenizer(prompt, add_special_tokens=False).input_ids
        line = []
        for choice in row["choices"]:
            ids = tokenizer(f"{prompt} {choice}", add_special_tokens=False).input_ids
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            line.append(sum(float(logits[i - 1, ids[i]]) for i in range(len(before), len(ids))))
        scores.append(line)
    return scores


class TestInstalled:
    pytestmark = needs_harness

    def test_a_local_task_is_measured_as_the_definition_says(self, task):
        model, tokenizer = tiny_llama(), tiny_tokenizer()
        right = [
            max(range(3), key=line.__getitem__) == row["label"]
            for line, row in zip(choice_scores(model, tokenizer), ROWS, strict=True)
        ]
        found = harness.run_tasks(model, tokenizer, [str(task)], batch_size=2, rows=None)
        assert found == {"numbers": {"acc": pytest.approx(sum(right) / len(right))}}
        limited = harness.run_tasks(model, tokenizer, [str(task)], batch_size=2, rows=1)
        assert limited["numbers"]["acc"] == float(right[0])

    @pytest.mark.parametrize(
        ("name", "message"),
        [("hellaswagg", "did you mean 'hellaswag'"), ("zzqqxx", "lm-eval ls tasks"), ("no.yaml", "no such file")],
    )
    def test_unknown_tasks(self, name, message):
        with pytest.raises(UsageError, match=message):
            harness.run_tasks(tiny_llama(), tiny_tokenizer(), [name], batch_size=2, rows=None)

    def test_a_file_that_is_no_task(self, tmp_path):
        (tmp_path / "x.yaml").write_text("- 1\n")
        with pytest.raises(UsageError, match=r"x\.yaml"):
            harness.run_tasks(tiny_llama(), tiny_tokenizer(), [str(tmp_path / "x.yaml")], batch_size=2, rows=None)

    def test_the_command_writes_eval_json_beside_what_was_measured_before(self, capsys, tmp_path, task):
        from tests.artifacts.helpers import lora_run

        run, _ = lora_run(tmp_path)
        run.write_json(run.eval, {"metrics": {"loss": 1.0}, "tasks": {"tea": {"acc": 1.0}}})
        adapter = run.adapter
        code = cli.run(["eval", str(adapter), "--tasks", str(task), "--base", "--json", "--recipe", recipe(tmp_path)])
        out = json.loads(capsys.readouterr().out)
        assert code == 0 and out["tasks"]["numbers"].keys() == out["base"]["numbers"].keys() == {"acc"}
        saved = json.loads((adapter / "eval.json").read_text())
        assert saved["tasks"] == out["tasks"] and saved["tasks_base"] == out["base"]


def recipe(folder):
    """Write a recipe that limits the rows; return its path."""
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    content = {
        "model": {"name_or_path": str(folder / "base")}, "method": {"name": "lora"},
        "data": {"train": str(folder / "rows.jsonl"), "format": "text"},
        "train": {"output_dir": str(folder / "new")}, "eval": {"rows": 3},
    }  # fmt: skip
    (folder / "r.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "r.yaml")
