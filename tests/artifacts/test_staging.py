import errno
import os
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from peftctl.artifacts import staging
from peftctl.artifacts.staging import clear_leftovers, discard, staged
from peftctl.errors import RunError


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_and_a_directory_replace_what_was_there(tmp_path):
    file, folder = tmp_path / "a.json", tmp_path / "model"
    for round_ in ("one", "two"):
        with staged(file) as aside:
            aside.write_text(round_)
        with staged(folder) as aside:
            aside.mkdir()
            (aside / f"{round_}.txt").write_text("x")
    assert file.read_text() == "two"
    assert names(folder) == ["two.txt"]
    assert names(tmp_path) == ["a.json", "model"]


def test_parents_are_made(tmp_path):
    with staged(tmp_path / "x" / "y" / "a.txt") as aside:
        aside.write_text("")
    assert (tmp_path / "x/y/a.txt").is_file()


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt()])
def test_an_exception_inside_leaves_the_old_content(tmp_path, failure):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(type(failure)), staged(folder) as aside:
        aside.mkdir()
        (aside / "half").write_text("x")
        raise failure
    assert names(tmp_path) == ["adapter"]
    assert (folder / "old").read_text() == "old"


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/1"),
    ],
)
def test_a_full_disk_is_one_line_and_changes_nothing(tmp_path, failure):
    target = tmp_path / "model"
    target.mkdir()
    with pytest.raises(RunError, match=r"disk full while writing .*model") as caught, staged(target) as aside:
        aside.mkdir()
        (aside / "half").write_text("x")
        raise failure
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    assert names(tmp_path) == ["model"]


def test_a_disk_that_fills_up_while_flushing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="disk full"), staged(tmp_path / "a") as aside:
        aside.write_text("new")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_refused_write_is_one_line(tmp_path):
    with pytest.raises(RunError, match=r"a: can't be written: Read-only file system"), staged(tmp_path / "a"):
        raise OSError(errno.EROFS, "Read-only file system")


def test_other_errors_pass(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), staged(tmp_path / "a"):
        raise RuntimeError("shapes do not fit")


def test_a_failing_rename_puts_the_old_directory_back(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").write_text("old")
    monkeypatch.setattr(staging.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(RunError, match="Input/output error"), staged(folder) as aside:
        aside.mkdir()
    assert names(tmp_path) == ["model"]
    assert names(folder) == ["old"]


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_dead_processes_are_cleared_and_of_live_ones_kept(tmp_path):
    dead, live = dead_pid(), os.getppid()
    (tmp_path / f".model.tmp-{dead}").mkdir()
    (tmp_path / f".model.tmp-{dead}" / "half").write_text("x")
    (tmp_path / f".a.json.tmp-{dead}").write_text("x")
    (tmp_path / f".other.tmp-{live}").write_text("x")
    (tmp_path / ".hidden").write_text("the user's")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden", f".other.tmp-{live}"]


def test_a_kill_between_the_two_renames_is_repaired(tmp_path):
    dead = dead_pid()
    (tmp_path / f".model.old-{dead}").mkdir()
    (tmp_path / f".model.old-{dead}" / "weights").write_text("old")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["model"]

    (tmp_path / f".model.old-{dead}").mkdir()  # killed after the second rename: the new one is in place
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_a_kill_inside_leaves_the_old_content_and_the_next_write_cleans_up(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    code = (
        "import os, signal; from pathlib import Path; from peftctl.artifacts.staging import staged\n"
        f"with staged(Path({str(target)!r})) as aside:\n"
        "    aside.mkdir(); (aside / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert names(target) == ["old"]
    assert len(names(tmp_path)) == 2
    with staged(target) as aside:
        aside.mkdir()
        (aside / "new").write_text("")
    assert names(tmp_path) == ["model"]
    assert names(target) == ["new"]


def test_discard_renames_before_it_deletes(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    monkeypatch.setattr(staging.shutil, "rmtree", lambda path: None)
    discard(folder)
    assert not folder.exists()


def test_torch_save_to_a_full_disk_is_recognised(tmp_path):
    with pytest.raises(RunError, match="disk full"), staged(tmp_path / "a"):
        torch.save(torch.zeros(1 << 16), "/dev/full")
