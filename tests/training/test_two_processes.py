"""Two processes train what one does, stage after stage: real DeepSpeed and gloo on the CPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.commands.helpers import REPOSITORY

WORKER = REPOSITORY / "tests" / "training" / "two_processes.py"
ZERO2 = REPOSITORY / "configs" / "deepspeed" / "zero2.json"
KINDS = ("lora", "two_stages", "fishmask")


def launched(folder, name, processes, config=None):
    """Run the worker; return what its first process wrote."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(WORKER), name, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *([str(config)] if config else [])],
        capture_output=True, text=True, timeout=300, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "result.pt", weights_only=True)


def losses(result):
    lines = [json.loads(line) for line in result["lines"].splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("name", KINDS)
def test_zero2_in_two_processes_equals_one_process_also_between_stages(tmp_path, name):
    one = launched(tmp_path / "one", name, 1)
    two = launched(tmp_path / "two", name, 2, ZERO2)
    assert [kind for kind, _, _ in two["seen"]] == ["DeepSpeedEngine"] * len(one["seen"])
    assert {world for _, world, _ in two["seen"]} == {2}
    assert [owned for _, _, owned in two["seen"]] == [owned for _, _, owned in one["seen"]]
    assert two["moved"] == one["moved"] and one["moved"]
    assert [two[key] for key in ("tokens", "supervised", "steps")] == [
        one[key] for key in ("tokens", "supervised", "steps")
    ]
    assert losses(two) == pytest.approx(losses(one), abs=1e-4) and len(losses(one)) == one["steps"]
    for key, tensor in one["tensors"].items():
        torch.testing.assert_close(two["tensors"][key], tensor, rtol=0, atol=1e-5)
