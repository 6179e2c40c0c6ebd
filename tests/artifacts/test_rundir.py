import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peftctl.artifacts.rundir import RunDir
from peftctl.errors import UsageError


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.recipe.write_text("model: {}\n")
    run.adapter.mkdir()
    (run.adapter / "w").write_text("x")
    run.write_json(run.summary, {"steps": 1})
    return run


def test_paths():
    run = RunDir("runs/lora")
    found = [run.recipe, run.environment, run.metrics, run.summary, run.eval, run.adapter, run.model, run.base]
    found.append(run.checkpoints)
    assert [str(p) for p in found] == [
        f"runs/lora/{n}"
        for n in (
            "recipe.yaml", "environment.json", "metrics.jsonl", "summary.json", "eval.json", "adapter", "model",
            "base", "checkpoints",
        )
    ]  # fmt: skip


def test_a_run_needs_a_flag_and_both_are_named(run):
    for refuse in (run.check, run.prepare):
        with pytest.raises(UsageError, match=r"holds a run.*--resume.*--fresh") as caught:
            refuse(fresh=False, resume=False)
        assert caught.value.exit_code == 2
    assert (run.adapter / "w").is_file()


def test_fresh_removes_the_run_and_nothing_else(run):
    (run.path / "notes.txt").write_text("mine")
    (run.path / "adapter2").mkdir()
    (run.checkpoints / "checkpoint-3").mkdir(parents=True)
    run.metrics.write_text("{}\n")
    run.prepare(fresh=True, resume=False)
    assert sorted(p.name for p in run.path.iterdir()) == ["adapter2", "notes.txt"]


def test_fresh_does_not_follow_links(run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "keep").write_text("x")
    run.model.symlink_to(elsewhere)
    run.prepare(fresh=True, resume=False)
    assert not os.path.lexists(run.model)
    assert (elsewhere / "keep").is_file()


def test_resume_keeps_the_run_and_clears_staging(run):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    run.checkpoints.mkdir()
    (run.path / f".adapter.tmp-{process.pid}").mkdir()
    (run.checkpoints / f".checkpoint-5.tmp-{process.pid}").mkdir()
    run.prepare(fresh=False, resume=True)
    assert sorted(p.name for p in run.path.iterdir()) == ["adapter", "checkpoints", "recipe.yaml", "summary.json"]
    assert not list(run.checkpoints.iterdir())


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True)])
def test_a_directory_of_something_else_is_refused_and_never_deleted(tmp_path, flags):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"not a run \('thesis.tex'\)"):
        RunDir(tmp_path).prepare(fresh=flags[0], resume=flags[1])
    assert (tmp_path / "thesis.tex").is_file()


def test_an_empty_or_a_new_directory_is_fine(tmp_path):
    for path in (tmp_path, tmp_path / "a" / "b"):
        RunDir(path).check(fresh=False, resume=False)
        RunDir(path).prepare(fresh=False, resume=False)
        assert path.is_dir()


def test_check_changes_nothing(tmp_path):
    RunDir(tmp_path / "new").check(fresh=True, resume=False)
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is not a directory"):
        RunDir(tmp_path / "file").check(fresh=False, resume=False)
    with pytest.raises(UsageError, match=r"no write access to .*file"):
        RunDir(tmp_path / "file" / "run").check(fresh=False, resume=False)


def test_no_write_access_is_one_line_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UsageError, match="can't be written: no write access") as caught:
        RunDir(tmp_path / "deep" / "run").check(fresh=False, resume=False)
    assert "\n" not in str(caught.value)


def test_two_processes_cannot_share_a_run_directory(run):
    code = (
        "import sys; from peftctl.artifacts.rundir import RunDir\n"
        f"with RunDir({str(run.path)!r}).lock():\n    print('in', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    with pytest.raises(UsageError, match=rf"process {other.pid} is writing here"), run.lock():
        pass
    other.kill()  # the system drops its lock
    other.communicate()
    with run.lock():
        assert (run.path / ".lock").read_text() == str(os.getpid())
    assert not (run.path / ".lock").exists()


def test_the_lock_makes_the_directory_and_does_not_look_like_something_else(tmp_path):
    run = RunDir(tmp_path / "new")
    with run.lock():
        run.prepare(fresh=False, resume=False)


def test_metrics_are_cut_after_a_step(run):
    lines = [json.dumps({"step": s, "stage": "main"}) + "\n" for s in (0, 10, 20, 30)]
    run.metrics.write_text("".join(lines))
    run.truncate_metrics(20)
    assert run.metrics.read_text() == "".join(lines[:3])


def test_a_half_written_last_line_is_cut(run):
    run.metrics.write_text('{"step": 10}\n{"step": 1')
    run.truncate_metrics(100)
    assert run.metrics.read_text() == '{"step": 10}\n'
    run.metrics.write_bytes(b'{"step": 10}\n{"name": "caf\xc3')
    run.truncate_metrics(100)
    assert run.metrics.read_text() == '{"step": 10}\n'


def test_no_metrics_yet(run):
    run.truncate_metrics(0)
    assert not run.metrics.exists()


def add_checkpoint(run, step, complete=True):
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    if complete:
        (folder / "trainer_state.json").write_text("{}")
    return folder


def test_the_latest_checkpoint_is_by_number_and_complete(run):
    assert run.latest_checkpoint() is None
    add_checkpoint(run, 9)
    ten = add_checkpoint(run, 10)
    add_checkpoint(run, 11, complete=False)
    (run.checkpoints / "checkpoint-best").mkdir()
    assert run.latest_checkpoint() == ten


def test_old_checkpoints_are_dropped(run):
    for step in (2, 10, 100):
        add_checkpoint(run, step)
    add_checkpoint(run, 101, complete=False)
    assert [p.name for p in run.complete_checkpoints()] == ["checkpoint-2", "checkpoint-10", "checkpoint-100"]
    run.drop_checkpoints(["checkpoint-10", "checkpoint-100", "checkpoint-7"])
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["checkpoint-10", "checkpoint-100", "checkpoint-101"]


def test_json_is_readable_and_whole(run):
    run.write_json(run.summary, {"name": "é", "n": 1})
    assert json.loads(run.summary.read_text(encoding="utf-8")) == {"name": "é", "n": 1}
