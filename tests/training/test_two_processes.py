"""Two processes train what one does: real DeepSpeed and gloo on the CPU."""

import json
import math
import subprocess

import pytest
import torch

from peftctl.methods import _matrix, registry
from scripts import probe_matrix, two_processes
from tests.commands.helpers import REPOSITORY

WORKER = REPOSITORY / "tests" / "training" / "two_processes.py"
ZERO2, ZERO3 = (REPOSITORY / "configs" / "deepspeed" / f"zero{stage}.json" for stage in (2, 3))


def launched(folder, processes, *options):
    """Run the worker; return what its first process wrote."""
    done = subprocess.run(
        two_processes.command("ddp" if processes > 1 else "single", WORKER, folder, *options),
        capture_output=True, text=True, timeout=300, env=two_processes.environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "result.pt", weights_only=True)


def losses(result):
    lines = [json.loads(line) for line in result["lines"].splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_zero2_in_two_processes_equals_one_process_also_between_stages(tmp_path):
    one = launched(tmp_path / "one", 1)
    two = launched(tmp_path / "two", 2, ZERO2)
    assert [kind for kind, _, _ in two["seen"]] == ["DeepSpeedEngine"] * len(one["seen"])
    assert {world for _, world, _ in two["seen"]} == {2}
    assert [owned for _, _, owned in two["seen"]] == [owned for _, _, owned in one["seen"]]
    assert two["moved"] == one["moved"] and one["moved"]
    assert [two[key] for key in ("tokens", "supervised", "steps")] == [
        one[key] for key in ("tokens", "supervised", "steps")
    ]
    assert losses(two) == pytest.approx(losses(one), abs=1e-4, nan_ok=True) and len(losses(one)) == one["steps"]
    assert [math.isnan(loss) for loss in losses(one)].count(True) == 2  # steps that were left out
    for key, tensor in one["tensors"].items():
        torch.testing.assert_close(two["tensors"][key], tensor, rtol=0, atol=1e-5)


def test_zero3_divides_4_bit_weights_and_stops_before_a_gradient_that_is_not_finite(tmp_path):
    two = launched(tmp_path, 2, ZERO3, "nf4")
    held, whole = two["shares"][0]
    blocks = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)  # of the tiny Llama, weights
    kept = 4 * 2 * 32 * 16 // 2  # k and v are too small to be divided
    assert whole == blocks // 2 and held == whole // 2 + kept
    assert "the gradient is not finite" in two["error"] and "no weight was changed" in two["error"]
    assert two["kept"] and all(torch.isfinite(tensor).all() for tensor in two["kept"].values())


# A tuner, two stages with shared tensors; a schedule with a loss, base weights; hooks; restarts.
SPREAD = {
    "ddp": ("lora", "lora_drop"),
    "zero2": ("adalora", "full"),
    "zero3": ("full", "lora", "mam"),
    "fsdp": ("lora", "relora"),
}
CELLS = [(name, engine) for engine, names in SPREAD.items() for name in names]


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """What a spread of the methods comes to through the engines, tried now."""
    folder = tmp_path_factory.mktemp("matrix")
    names = list(dict.fromkeys(name for name, _ in CELLS))
    probe_matrix.probe(names, ["single"], ["float32"], folder, checkpointing=False)  # one launch for all
    return {
        (name, engine): cells[f"float32/{engine}"]
        for engine, some in SPREAD.items()
        for name, cells in probe_matrix.probe(some, [engine], ["float32"], folder, checkpointing=False).items()
    }


@pytest.mark.parametrize(("name", "engine"), CELLS)
def test_the_matrix_says_what_happens(tried, name, engine):
    recorded = _matrix.rows()[name]["cells"][f"float32/{engine}"]
    assert tried[name, engine] == recorded == ""


def test_the_matrix_has_every_method_that_trains_as_its_code_is_now():
    names = [name for name in registry.names() if "trains" not in registry.get(name).card.gates_off]
    assert sorted(_matrix.rows()) == sorted(names)
    assert all(_matrix.up_to_date(name) for name in names)
