"""What one process sees of the others; two real ones are in tests/commands/test_launches.py."""

import pytest

from peftctl.backends import processes
from peftctl.backends.pids import running
from peftctl.errors import UsageError

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def launched(monkeypatch):
    """Set what a launcher would, and nothing else."""

    def launch(**variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


def test_one_process_agrees_with_itself(launched):
    launched()
    processes.start()
    processes.wait()
    with processes.first_goes_ahead():
        assert (processes.size(), processes.rank(), processes.is_first()) == (1, 0, True)
    assert processes.from_first("x") == "x" and processes.gathered("x") == ["x"]
    assert processes.summed([1, 2.5]) == [1, 2.5]
    assert processes.end_in_failure("why", 2)  # it prints its own error
    processes.stop()


@pytest.mark.parametrize("size", ["1", ""])
def test_a_world_of_one_needs_nothing(launched, size):
    launched(WORLD_SIZE=size, RANK="3")
    processes.start()
    assert processes.rank() == 0


def test_half_a_launcher_is_refused(launched):
    launched(WORLD_SIZE="2", RANK="0")
    with pytest.raises(UsageError, match=r"WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT is not set: .*torchrun"):
        processes.start()


@pytest.mark.parametrize("name", ["deepspeed", "fsdp"])
def test_an_engine_that_the_recipe_does_not_know_of_is_refused(launched, monkeypatch, name):
    launched()
    processes._refuse_foreign_engine.cache_clear()
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(UsageError, match=f"told to use {name}, by --use_{name} .*set backend.name: {name}"):
        processes.start()


def test_more_processes_than_gpus_is_refused(launched, monkeypatch):
    launched(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UsageError, match="process 1 of this machine has no GPU of its own: there are 1"):
        processes.start()


def test_only_the_first_process_of_a_machine_speaks_before_they_have_met(launched, monkeypatch):
    monkeypatch.setattr(processes, "_HEAD_START", 0.0)
    launched(WORLD_SIZE="4", RANK="2", LOCAL_RANK="0")
    assert processes.end_in_failure("why", 2)
    launched(WORLD_SIZE="4", RANK="3", LOCAL_RANK="1")
    assert not processes.end_in_failure("why", 2)


def test_a_process_that_has_ended_does_not_exist():
    import os
    import subprocess
    import sys

    assert running(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", ""])
    while child.poll() is None and running(child.pid):  # a zombie counts as ended
        pass
    assert not running(child.pid)
    child.wait()
