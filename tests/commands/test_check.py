"""`peftctl check`: the plan as it is shown, for which machine, and what it advises."""

import json
import re

import pytest

from peftctl import cli, console
from peftctl.commands import planning
from peftctl.commands.check import check
from peftctl.commands.prepare import prepare
from peftctl.commands.recipes import load_recipe
from peftctl.commands.train import train
from peftctl.training.memory import Machine
from tests.commands.helpers import write_recipe

MIB = 2**20


@pytest.fixture
def path(tmp_path, tiny_dir):
    return str(write_recipe(tmp_path, tiny_dir, train={"batch_size": 8}))


def run(capsys, *arguments):
    code = cli.run([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def total(path, *overrides, **options):
    return check(load_recipe(path, overrides), device="cuda", preview_rows=0, **options).plan.total


def test_parts_add_up_and_what_is_left_is_shown(capsys, path):
    code, out, _ = run(capsys, "check", path, "--rows", "0", "--device", "cuda", "--memory", "1 GiB")
    assert code == 0
    plan = out[out.index("memory plan on cuda") :]
    found = dict(re.findall(r"^(\w[\w ]*?)\s+(\d+\.\d\d) GiB", plan, re.MULTILINE))
    assert {"weights", "activations", "process", "total", "available", "left"} <= found.keys()
    assert "missing" not in found and "main memory" not in found
    assert float(found["available"]) == 1 == float(found["total"]) + float(found["left"])


def test_json_has_the_plan_and_the_advice(capsys, path):
    code, out, _ = run(capsys, "check", path, "--rows", "0", "--device", "cuda", "--memory", "513MiB", "--json")
    report = json.loads(out)
    assert code == 2 and report["fits"] is False
    parts = {k: v for k, v in report["plan"].items() if k not in ("device", "host", "traced")}
    assert report["memory_total"] == sum(parts.values())
    assert report["plan"]["traced"] is True and report["processes"] == 1
    assert report["advice"] and all(a.keys() == {"change", "total"} for a in report["advice"])


def test_every_advice_is_the_plan_of_that_change(path):
    report = check(load_recipe(path), device="cuda", memory="1KB", preview_rows=0)
    changes = {a.change: a.total for a in report.advice}
    assert "train.gradient_checkpointing=true" in changes
    assert any(change.startswith("train.tokens_per_pass=") for change in changes)
    assert any(change.startswith("data.max_length=") or "bfloat16" in change for change in changes)
    totals = [a.total for a in report.advice]
    *single, together = totals
    assert single == sorted(single) and together < min(single)  # nothing is enough: the last is all of them
    for change, size in [*changes.items()][:2] + [*changes.items()][-1:]:
        assert total(path, *change.split()) == size < report.plan.total


def advice(path, memory, *overrides):
    report = check(load_recipe(path, overrides), device="cuda", memory=str(memory), preview_rows=0)
    return [a.change for a in report.advice]


def test_advice_stops_at_what_is_enough(path):
    tokens = [
        int(c.split("=")[1]) for c in advice(path, "1KB") if c.startswith("train.tokens_per_pass=") and " " not in c
    ]
    longest = tokens[0]  # nothing is enough: a row a pass
    half, quarter = (total(path, f"train.tokens_per_pass={8 * longest >> i}") for i in (1, 2))
    assert quarter < half
    assert f"train.tokens_per_pass={8 * longest >> 1}" in advice(path, half)
    report = check(load_recipe(path), device="cuda", memory=str(half - 1), preview_rows=0)
    assert f"train.tokens_per_pass={8 * longest >> 2}" in [a.change for a in report.advice]
    assert not any("per_pass" in a.change and "checkpointing" in a.change for a in report.advice)
    assert report.verdict[0].startswith("the plan takes ") and any(line.endswith("(fits)") for line in report.verdict)


def test_through_an_engine_it_is_smaller_micro_batches(path):
    engine = ("backend.name=deepspeed", "backend.config=configs/deepspeed/zero2.json")
    changes = advice(path, "1KB", *engine)
    assert "train.batch_size=1 train.gradient_accumulation=8" in changes
    assert not any("per_pass" in change for change in changes)


def test_what_fits_needs_no_advice(path):
    report = check(load_recipe(path), device="cuda", memory="24GB", preview_rows=0)
    assert report.fits and report.advice == [] and report.verdict == []


def test_what_a_method_does_not_support_is_no_advice(tmp_path, tiny_dir):
    path = write_recipe(tmp_path, tiny_dir, {"name": "full"})
    report = check(load_recipe(str(path)), device="cuda", memory="1KB", preview_rows=0)
    changes = " ".join(a.change for a in report.advice)
    assert "quantization" not in changes and "model.dtype" not in changes
    assert "train.optimizer=paged_adamw_8bit" in changes


def test_an_environment_variable_saves_holes_on_a_cpu(path, monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setattr("peftctl.backends.heap._glibc", lambda: True)
    ready = prepare(load_recipe(path))
    machine = Machine("cpu")
    needed = planning.plan(ready, machine)
    found = {a.change: a.total for a in planning.advise(ready, machine, needed, needed.total - 1)}
    assert found["MALLOC_MMAP_THRESHOLD_=131072 in the environment"] == needed.total - needed.allocator


def test_processes_take_fewer_steps_and_share_a_cpu_s_memory(capsys, path):
    report = check(
        load_recipe(path, ["train.max_steps=null"]), device="cpu", memory="80GB", processes=2, preview_rows=0
    )
    alone = check(load_recipe(path, ["train.max_steps=null"]), device="cpu", memory="80GB", preview_rows=0)
    assert (alone.steps, report.steps) == (3, 2)
    assert (alone.available, report.available) == (80 * 10**9, 40 * 10**9)
    assert report.plan.sharing == 4 * report.trainable > 0 == alone.plan.sharing  # DDP's buckets
    code, out, _ = run(capsys, "check", path, "--rows", "0", "--device", "cuda", "--memory", "9GB", "--processes", "2")
    assert code == 0 and "memory plan of each of 2 processes on cuda" in out


def test_zero_is_planned_from_the_shipped_configurations(path):
    options = ["backend.name=deepspeed", "backend.config=configs/deepspeed/zero2_offload.json"]
    report = check(load_recipe(path, options), device="cuda", memory="9GB", processes=4, preview_rows=0)
    assert report.plan.host > 0 == report.plan.optimizer
    assert ["main memory", f"{report.plan.host / 2**30:.2f} GiB"] in report.tables()[-1][1]


def test_the_notice_on_paged_optimizers_is_for_cpus(path):
    options = ["train.optimizer=paged_adamw_32bit"]
    notices = {
        device: check(load_recipe(path, options), device=device, memory="9GB", preview_rows=0).notices
        for device in ("cpu", "cuda")
    }
    assert any("unpaged" in line for line in notices["cpu"])
    assert not any("unpaged" in line for line in notices["cuda"])


def test_an_estimate_says_so(path, monkeypatch):
    def fails(*_):
        raise RuntimeError("needs numbers")

    monkeypatch.setattr("peftctl.training.memory.step_bytes", fails)
    report = check(load_recipe(path), device="cuda", memory="9GB", preview_rows=0)
    assert not report.plan.traced and any("estimated from the model's widths" in line for line in report.notices)


def test_the_model_is_built_once(path, monkeypatch):
    from peftctl.commands import prepare as preparing

    built = []
    monkeypatch.setattr(
        preparing, "meta_model", lambda *a, real=preparing.meta_model, **k: built.append(a) or real(*a, **k)
    )
    monkeypatch.setattr(planning, "meta_model", lambda *a, **k: pytest.fail("built twice"))
    check(load_recipe(path), device="cuda", memory="9GB", preview_rows=0)
    assert len(built) == 1


def test_training_compares_its_peak_with_the_plan(capsys, path):
    result = train(load_recipe(path))
    summary = json.loads((result.run / "summary.json").read_text())
    assert summary["predicted_memory_bytes"] == result.summary["predicted_memory_bytes"]
    assert summary["predicted_memory_bytes"] == pytest.approx(summary["peak_memory_bytes"], rel=0.5)
    console.show_summary(result)
    predicted, measured = summary["predicted_memory_bytes"], summary["peak_memory_bytes"]
    shown = f"{measured / 2**30:.2f} GiB (predicted {predicted / 2**30:.2f} GiB, {predicted / measured - 1:+.0%})"
    assert shown in capsys.readouterr().out
