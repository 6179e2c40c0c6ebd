"""`peftctl train` from a recipe on disk to a checked artefact."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import peftctl
from peftctl.console import Reporter
from peftctl.errors import RunError, UsageError
from tests.commands.helpers import REPOSITORY, write_recipe, write_rows
from tests.commands.helpers import peftctl as command

METHODS = [
    {"name": "lora", "r": 4, "target_modules": "all-linear"},
    {"name": "adalora", "init_r": 4, "target_r": 2, "target_modules": "all-linear"},
    {"name": "last_layers", "layers": 2},
    {"name": "full"},
    {"name": "hard_prompt", "shots": 2},
]


def train(path, *overrides, **options):
    return peftctl.train(peftctl.load_recipe(path, overrides), **options)


def recipe_for(method, tmp_path, tiny_dir):
    path = write_recipe(tmp_path, tiny_dir, method=method)
    if method["name"] == "hard_prompt":
        text = path.read_text()
        path.write_text(text[: text.index("train:\n  output_dir")] + f"train:\n  output_dir: {tmp_path / 'run'}\n")
    return path


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m["name"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_method_leaves_a_run_that_loads(tmp_path, tiny_dir, method, dtype):
    path = recipe_for(method, tmp_path, tiny_dir)
    result = train(path, f"model.dtype={dtype}")
    names = {p.name for p in result.run.iterdir()}
    assert {"recipe.yaml", "environment.json", "metrics.jsonl", "summary.json"} <= names
    assert ("model" in names) == (method["name"] == "full")
    assert ("adapter" in names) == (method["name"] != "full")
    summary = result.summary
    assert summary["method"] == method["name"]
    assert json.loads((result.run / "eval.json").read_text())["metrics"] == summary["eval"]["after"]
    assert summary["eval"]["before"]["loss"] > 0 and summary["eval"]["after"]["loss"] > 0
    model, tokenizer = peftctl.load(str(result.run))
    ids = tokenizer("answer with 3", return_tensors="pt").input_ids
    assert torch.isfinite(model(input_ids=ids).logits).all()
    if method["name"] == "hard_prompt":
        assert summary["trainable_parameters"] == 0
    else:
        assert summary["steps"] == 6 and summary["supervised_tokens"] < summary["train_tokens"]
        assert summary["eval"]["after"]["loss"] < summary["eval"]["before"]["loss"]


def test_the_resolved_recipe_repeats_the_run_bit_for_bit(tmp_path, tiny_dir):
    first = train(write_recipe(tmp_path, tiny_dir))
    second = train(first.run / "recipe.yaml", f"train.output_dir={tmp_path / 'again'}")
    name = "adapter_model.safetensors"
    assert (first.artefact / name).read_bytes() == (second.artefact / name).read_bytes()


def test_adapter_loads_in_plain_peft_in_a_fresh_process(tmp_path, tiny_dir):
    result = train(write_recipe(tmp_path, tiny_dir))
    model, _ = peftctl.load(str(result.run))
    ids = list(range(5, 25))
    code = (
        "import sys, torch\nfrom peft import AutoPeftModelForCausalLM\n"
        f"m = AutoPeftModelForCausalLM.from_pretrained({str(result.artefact)!r}).eval()\n"
        f"print(m(input_ids=torch.tensor([{ids}])).logits.double().sum().item())\n"
        "assert 'peftctl' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    expected = model(input_ids=torch.tensor([ids])).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-6)


def test_metrics_and_summary_carry_real_figures(tmp_path, tiny_dir):
    result = train(write_recipe(tmp_path, tiny_dir))
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "learning_rate" in line]
    assert [line["step"] for line in logged] == [1, 2, 4, 6]
    assert all(line["tokens_per_second"] > 0 and line["grad_norm"] > 0 and line["stage"] == "main" for line in logged)
    summary = result.summary
    tensors = load_file(result.artefact / "adapter_model.safetensors")
    assert summary["trainable_parameters"] == sum(t.numel() for t in tensors.values())
    assert summary["adapter_bytes"] == (result.artefact / "adapter_model.safetensors").stat().st_size
    assert summary["peak_memory_bytes"] > 50 * 2**20
    rows = [f"answer with {i}" for i in range(24)]
    _, tokenizer = peftctl.load(str(result.run))
    answers = [[*tokenizer(str(i)).input_ids, tokenizer.eos_token_id] for i in range(24)]
    assert len(rows) == 24 and summary["supervised_tokens"] == sum(map(len, answers))  # 6 steps of 4: one pass


def test_an_output_directory_that_holds_a_run_is_refused_naming_both_ways_out(tmp_path, tiny_dir):
    path = write_recipe(tmp_path, tiny_dir)
    train(path)
    with pytest.raises(UsageError, match=r"--resume.*--fresh|--fresh.*--resume"):
        train(path)
    assert train(path, fresh=True).summary["steps"] == 6


def test_resume_of_a_complete_run_does_nothing(tmp_path, tiny_dir):
    path = write_recipe(tmp_path, tiny_dir)
    first = train(path)
    stamp = (first.artefact / "adapter_model.safetensors").stat().st_mtime_ns
    again = train(path, resume=True)
    assert again.summary == first.summary
    assert (first.artefact / "adapter_model.safetensors").stat().st_mtime_ns == stamp


class Killer(Reporter):
    def __init__(self, step):
        self.at = step

    def step(self, step, metrics=None):
        if step == self.at and metrics is None:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_changed_recipe_or_data_set_is_refused_with_the_difference(tmp_path, tiny_dir):
    path = write_recipe(tmp_path, tiny_dir, train={"save_steps": 2})
    with pytest.raises(RunError, match="--resume"):
        train(path, reporter=Killer(3))
    with pytest.raises(UsageError, match=r"train.learning_rate: 0.01 -> 0.02"):
        train(path, "train.learning_rate=0.02", resume=True)
    train_rows = (tmp_path / "train.jsonl").read_text()
    write_rows(tmp_path / "train.jsonl", first=1)
    with pytest.raises(UsageError, match="training data: fingerprint"):
        train(path, resume=True)
    (tmp_path / "train.jsonl").write_text(train_rows)
    assert train(path, "train.logging_steps=1", resume=True).summary["steps"] == 6


def test_kill_9_then_resume_equals_the_uninterrupted_run(tmp_path, tiny_dir):
    """The run is killed at a random moment after its second checkpoint; what is left must resume to the same bytes."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    many = {"max_steps": 60, "save_steps": 3}
    straight = train(write_recipe(tmp_path / "a", tiny_dir, train=many))
    path = write_recipe(tmp_path / "b", tiny_dir, train=many)
    process = subprocess.Popen(
        [sys.executable, "-m", "peftctl", "train", str(path)],
        stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, cwd=tmp_path,
    )  # fmt: skip
    checkpoints = tmp_path / "b" / "run" / "checkpoints"
    while process.poll() is None and not any(checkpoints.glob("checkpoint-6*")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for folder in checkpoints.glob("checkpoint-*"):
        assert (folder / "trainer_state.json").is_file()
    resumed = train(path, resume=True)
    name = "adapter_model.safetensors"
    assert (resumed.artefact / name).read_bytes() == (straight.artefact / name).read_bytes()
    steps = [json.loads(line)["step"] for line in (resumed.run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_ctrl_c_on_the_command_line_writes_a_checkpoint_and_exits_1(tmp_path, tiny_dir):
    path = write_recipe(tmp_path, tiny_dir, train={"max_steps": 3000})
    process = subprocess.Popen(
        [sys.executable, "-m", "peftctl", "train", str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, cwd=tmp_path,
    )  # fmt: skip
    for line in process.stdout:
        if "main 2/" in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    step = re.search(r"stopped by SIGINT after step (\d+)", errors).group(1)
    assert "--resume" in errors and "Traceback" not in errors
    assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").is_file()


def test_at_most_ten_lines_before_the_first_step_and_no_library_noise(tmp_path, tiny_dir):
    done = command("train", write_recipe(tmp_path, tiny_dir))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("main 1/6"))
    assert first <= 10
    assert done.stderr == ""


def test_tensorboard_gets_the_metrics_inside_the_run_directory(tmp_path, tiny_dir):
    pytest.importorskip("tensorboard")
    result = train(write_recipe(tmp_path, tiny_dir, train={"report_to": ["tensorboard"]}))
    events = list((result.run / "tensorboard").glob("events.*"))
    assert events and b"train/loss" in events[0].read_bytes()


def test_a_loss_curve_is_drawn(tmp_path, tiny_dir):
    pytest.importorskip("matplotlib")
    result = train(write_recipe(tmp_path, tiny_dir))
    assert (result.run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_written_outside_the_output_directory(tmp_path, tiny_dir, monkeypatch):
    path = write_recipe(tmp_path, tiny_dir)
    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    before = set(tmp_path.rglob("*"))
    result = train(path)
    new = {p for p in set(tmp_path.rglob("*")) - before if result.run not in p.parents and p != result.run}
    assert new == set()
