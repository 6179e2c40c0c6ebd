"""What `train` and `check` make of weighted sources, the best weights and early stopping, from a recipe on disk."""

import json
import signal

import pytest

import peftctl
from peftctl.commands import prepare
from peftctl.commands.check import check
from peftctl.errors import Interrupted, UsageError
from tests.commands.helpers import write_recipe, write_rows
from tests.training.test_resume import StopAt

# The held-out loss falls until step 4 of the 12 and rises at the next two.
SETTINGS = {
    "load_best": True, "early_stopping": 2, "eval_steps": 1, "max_steps": 12, "learning_rate": 0.03,
    "scheduler": "constant", "logging_steps": 1, "save_total_limit": 1,
}  # fmt: skip


def load(path, *overrides):
    return peftctl.load_recipe(path, overrides)


def with_sources(tmp_path, tiny_dir, **data):
    write_rows(tmp_path / "old.jsonl", count=40, first=200)
    sources = [{"path": "train.jsonl", "weight": 2.0}, {"path": "old.jsonl", "weight": 0.25}]
    path = write_recipe(tmp_path, tiny_dir, data={"sources": sources, **data}, train={"max_steps": 2})
    text = path.read_text().replace("  train: train.jsonl\n", "")
    path.write_text(text.replace("  eval: eval.jsonl\n", "") if "eval_fraction" in data else text)
    return path


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_artefact_has_the_best_weights_and_a_resumed_run_the_same(tmp_path, tiny_dir):
    path = write_recipe(tmp_path, tiny_dir, train=SETTINGS)
    straight = peftctl.train(load(path))
    losses = {line["step"]: line["eval_loss"] for line in lines(straight.run) if "eval_loss" in line}
    selected = straight.summary["selected"]
    best = min(losses, key=losses.get)
    assert selected == {
        "best_step": best,
        "best_eval_loss": losses[best],
        "step_of_weights": best,
        "stopped_early": True,
    }
    assert (best, straight.summary["steps"]) == (4, 6)
    assert straight.summary["eval"]["after"]["loss"] == pytest.approx(losses[best], abs=1e-5)
    assert straight.summary["eval"]["after"]["loss"] < losses[best + 2] - 1e-4
    with pytest.raises(Interrupted):
        peftctl.train(load(path, f"train.output_dir={tmp_path / 'stopped'}"), reporter=StopAt(3, signal.SIGTERM))
    resumed = peftctl.train(load(path, f"train.output_dir={tmp_path / 'stopped'}"), resume=True)
    assert resumed.summary["selected"] == selected
    name = "adapter_model.safetensors"
    assert (resumed.artefact / name).read_bytes() == (straight.artefact / name).read_bytes()


def test_a_run_without_selection_has_no_such_record(tmp_path, tiny_dir):
    result = peftctl.train(load(write_recipe(tmp_path, tiny_dir, train={"max_steps": 1})))
    assert "selected" not in result.summary
    assert "data_sources" not in json.loads((result.run / "environment.json").read_text())


def test_check_and_the_run_record_show_each_source(tmp_path, tiny_dir):
    path = with_sources(tmp_path, tiny_dir)
    report = check(load(path))
    shown = dict(row for title, rows in report.tables() for row in rows)
    assert shown["source 1: train.jsonl, weight 2"].startswith("48 rows, ")
    assert shown["source 2: old.jsonl, weight 0.25"].startswith("10 rows, ")
    figures = report.to_dict()["supervision"]["training"]["sources"]
    assert [source["rows"] for source in figures] == [48, 10]
    result = peftctl.train(load(path))
    recorded = json.loads((result.run / "environment.json").read_text())["data_sources"]
    assert recorded == list(figures)
    again = peftctl.load_recipe(result.run / "recipe.yaml")
    assert again == load(path)


def test_steps_of_an_epoch_count_copies(tmp_path, tiny_dir):
    path = with_sources(tmp_path, tiny_dir)
    assert check(load(path, "train.max_steps=null", "train.epochs=1")).steps == 15  # 58 rows, 4 a step


def test_rows_held_out_of_sources_are_not_trained_on(tmp_path, tiny_dir):
    ready = prepare.prepare(load(with_sources(tmp_path, tiny_dir, eval_fraction=0.25)))
    held_out = {row.where for row in ready.eval_rows}
    assert len(held_out) == 16 and held_out.isdisjoint(row.where for row in ready.train_rows)


def test_another_weight_is_another_run(tmp_path, tiny_dir):
    path = with_sources(tmp_path, tiny_dir)
    with pytest.raises(Interrupted):
        peftctl.train(load(path), reporter=StopAt(1))
    path.write_text(path.read_text().replace("weight: 2.0", "weight: 3.0"))
    with pytest.raises(UsageError, match=r"data.sources\[0\].weight: 2.0 -> 3.0\n  training data: fingerprint"):
        peftctl.train(load(path), resume=True)


def test_a_missing_bitsandbytes_is_one_line(tmp_path, tiny_dir, monkeypatch):
    monkeypatch.setattr(prepare, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    path = write_recipe(tmp_path, tiny_dir)
    message = (
        "train.optimizer: paged_adamw_32bit needs bitsandbytes, which is not installed; "
        "pip install bitsandbytes, or set it to adamw"
    )
    with pytest.raises(UsageError) as error:
        prepare.prepare(load(path, "train.optimizer=paged_adamw_32bit"))
    assert str(error.value) == message
    prepare.prepare(load(path, "train.optimizer=adafactor"))


def test_paged_optimizers_have_a_notice_on_a_cpu(tmp_path, tiny_dir):
    path = write_recipe(tmp_path, tiny_dir)
    line = "paged optimizers run unpaged on a CPU"
    assert check(load(path, "train.optimizer=paged_adamw_8bit")).notices.count(line) == 1
    assert line not in check(load(path, "train.optimizer=adamw_8bit")).notices
