"""Try every method with every storage of the base through every engine; keep what holds in peftctl/methods/matrix.json.

    python scripts/probe_matrix.py [METHOD ...] [--engines single ddp zero2 zero3] [--storages float32 nf4]

An engine is one launch of two processes that goes through the methods on tiny models. Two processes x batch 2 x
accumulation 2 must come to what one process with batch 8 comes to: the loss of every step, every trained tensor, the
logits; a run that goes on from a checkpoint too; and with gradient checkpointing too, where the card claims it. Rows
do not divide evenly. A cell is the reason why it does not hold, or nothing.

Only methods whose code has changed since are tried again; `peftctl methods --matrix` shows the table, `check` and
`train` refuse what is not proven.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ("single", "ddp", "zero1", "zero2", "zero3")
STORAGES = ("float32", "bfloat16", "nf4", "int8")
STEPS, HALF, ROWS_A_STEP = 4, 2, 8
SAME_LOSS = {"float32": 1e-4, "bfloat16": 0.05, "nf4": 0.05, "int8": 0.05}
SAME_TENSOR = {"float32": 1e-3, "bfloat16": 0.2, "nf4": 0.2, "int8": 0.2}
"""Largest difference of a loss (nats), and of a tensor as a share of its norm. Half types and quantised bases round."""
SILENT, BUILDING = 60, 400
"""Seconds without a result after which a run counts as hanging; before the first, DeepSpeed may compile."""


@dataclass(frozen=True)
class Run:
    """One training run of the matrix."""

    method: str
    storage: str
    kind: str  # straight, resume or checkpointing

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.method}-{self.storage}-{self.kind}"


def main() -> None:
    options = parse()
    if options.worker:
        work(options)
        return
    from peftctl.methods import _matrix as matrix

    names = [name for name in options.methods or trained() if options.again or not matrix.up_to_date(name)]
    with tempfile.TemporaryDirectory() as folder:
        found = probe(names, options.engines, options.storages, options.out or Path(folder))
    for name in names:
        matrix.record(name, found[name])
    print("\n".join(f"{name} {cell}: {why or 'holds'}" for name in names for cell, why in found[name].items()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="left out, all whose code has changed")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["single", "ddp", "zero2", "zero3"])
    parser.add_argument("--storages", nargs="+", choices=STORAGES, default=list(STORAGES))
    parser.add_argument("--again", action="store_true", help="also what has not changed")
    parser.add_argument("--worker", metavar="ENGINE", help=argparse.SUPPRESS)
    parser.add_argument("--runs", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="keep the runs here; those that are there are not run again")
    return parser.parse_args()


def trained() -> list[str]:
    """Return the methods that train."""
    from peftctl.methods import registry

    return [name for name in registry.names() if "trains" not in registry.get(name).card.gates_off]


def runs_of(method: str, storages: Sequence[str], *, checkpointing: bool = True) -> Iterator[Run]:
    """Yield what a method's card claims, the base in each storage."""
    from peftctl.methods import registry

    supports = registry.get(method).card.supports
    needed = {"nf4": "4bit", "int8": "8bit"}
    for storage in storages:
        if needed.get(storage, "resume") in supports | {"resume"}:
            yield Run(method, storage, "straight")
            yield Run(method, storage, "resume")
            if checkpointing and "gradient_checkpointing" in supports:
                yield Run(method, storage, "checkpointing")


# -- the launches ----------------------------------------------------------------------------------------------------


def probe(
    methods: Sequence[str], engines: Sequence[str], storages: Sequence[str], folder: Path, *, checkpointing: bool = True
) -> dict[str, dict[str, str]]:
    """Return the cells of each method: `storage/engine` -> why not, or nothing."""
    runs = [run for method in methods for run in runs_of(method, storages, checkpointing=checkpointing)]
    for engine in dict.fromkeys(["single", *engines]):
        launch(engine, runs, folder / engine)
    cells: dict[str, dict[str, str]] = {method: {} for method in methods}
    for engine in engines:
        for run in runs:
            key = f"{run.storage}/{engine}"
            why = compare(run, folder / "single", folder / engine)
            if why or key not in cells[run.method]:
                cells[run.method][key] = cells[run.method].get(key) or why
    return cells


def launch(engine: str, runs: list[Run], out: Path) -> None:
    """Go through the runs in one launch; one that hangs is noted, and the rest launched anew."""
    out.mkdir(parents=True, exist_ok=True)
    left = [run for run in runs if not (out / f"{run.name}.json").is_file()]
    while left:
        todo = json.dumps([vars(run) for run in left])
        (out / "todo.json").write_text(todo)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [sys.executable, *(launcher if engine != "single" else []), __file__]
        command += ["--worker", engine, "--runs", str(out / "todo.json"), "--out", str(out)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        with (out / "log.txt").open("a") as log:
            process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)
            reason = wait(process, out, left)
        tried = [run for run in left if (out / f"{run.name}.json").is_file()]
        left = left[len(tried) :]
        failed_before = tried and json.loads((out / f"{tried[-1].name}.json").read_text())["error"]
        if not tried and reason == "ended" and len(left) == len(runs) > 1:
            sys.exit(f"{engine}: no run came to a result\n{(out / 'log.txt').read_text()[-3000:]}")
        # A run that fails in one process may leave the other waiting, which is not the next run's fault.
        if left and not failed_before:
            error = f"{reason}: {(out / 'log.txt').read_text()[-300:]}" if reason == "ended" else reason
            (out / f"{left.pop(0).name}.json").write_text(json.dumps({"error": error}))


def wait(process: subprocess.Popen, out: Path, runs: list[Run]) -> str:
    """Wait for a launch while results keep coming; return how it ended."""
    done, changed = 0, time.monotonic()
    while process.poll() is None:
        time.sleep(1)
        now = sum((out / f"{run.name}.json").is_file() for run in runs)
        if now > done:
            done, changed = now, time.monotonic()
        if time.monotonic() - changed > (SILENT if done else BUILDING):
            process.terminate()
            process.wait()
            return "hangs"
    return "ended"


def compare(run: Run, single: Path, other: Path) -> str:
    """Return why a run of an engine is not what one process came to; nothing where it is."""
    from safetensors.torch import load_file

    expected = json.loads((single / f"{run.method}-{run.storage}-straight.json").read_text())
    found = json.loads((other / f"{run.name}.json").read_text())
    for result in (expected, found):
        if result["error"]:
            return f"{run.kind}: {result['error']}".replace(str(other.parent), "")
    if found["world"] != (1 if other.name == "single" else 2):
        return f"{run.kind}: ran in {found['world']} processes"
    first = len(expected["losses"]) - len(found["losses"])
    apart = [abs(a - b) for a, b in zip(expected["losses"][first:], found["losses"], strict=True)]
    if not found["losses"] or not max(apart) <= SAME_LOSS[run.storage]:
        return f"{run.kind}: losses differ by up to {max(apart, default=math.nan):.2g}"
    tensors, others = (
        load_file(folder / f"{name}.safetensors")
        for folder, name in ((single, f"{run.method}-{run.storage}-straight"), (other, run.name))
    )
    if tensors.keys() != others.keys():
        return f"{run.kind}: other tensors train"
    for name, tensor in tensors.items():
        if others[name].shape != tensor.shape:
            return f"{run.kind}: {name} has shape {tuple(others[name].shape)}"
        if name.endswith("k_proj.bias"):  # it shifts all scores of a query alike: its gradient is nothing but rounding
            continue
        share = float((others[name] - tensor).norm() / tensor.norm().clamp_min(1e-12))
        if not share <= SAME_TENSOR[run.storage]:
            return f"{run.kind}: {name} differs by {share:.2g} of its norm"
    return ""


# -- in a process of a launch ----------------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> None:
    """Go through the runs in this process, one of two or alone."""
    from peftctl.backends import device, processes
    from peftctl.cli import quiet_libraries
    from tests import tiny
    from tests.methods.conformance import Bench

    quiet_libraries()
    processes.start()
    device.set_threads()
    bench = Bench(options.out / "bench")
    if not processes.is_first():  # the first one writes the tiny models
        tiny.save_tiny = lambda folder, *_: folder
    for content in json.loads(Path(options.runs).read_text()):
        run = Run(**content)
        straight = options.out / f"{run.method}-{run.storage}-straight.json"
        if run.kind != "straight" and json.loads(straight.read_text())["error"]:
            shutil.copy(straight, options.out / f"{run.name}.json") if processes.is_first() else None
            continue
        faulthandler.dump_traceback_later(SILENT - 10)  # where it hangs, into the log
        try:
            result = train(run, options.worker, bench, options.out)
        except Exception as error:
            traceback.print_exc()
            # An assertion says nothing but its line.
            line = (str(error).splitlines() or [traceback.extract_tb(error.__traceback__)[-1].line or ""])[0]
            noted = options.out / f"{run.name}.json"
            if not noted.is_file():  # by the other process, which this one has only lost
                noted.write_text(json.dumps({"error": f"{type(error).__name__}: {line}"[:200]}))
            os._exit(1)  # the engine is in no state to go on from, and the other process may wait for this one
        if processes.is_first():
            (options.out / f"{run.name}.json").write_text(json.dumps(result))
        gc.collect()
        processes.wait()
    processes.stop()


def train(run: Run, engine: str, bench: Any, out: Path) -> dict[str, Any]:
    """Train one run; the first process saves the tensors."""
    import torch
    from safetensors.torch import save_file

    from peftctl.artifacts.checks import probe_logits
    from peftctl.artifacts.rundir import RunDir
    from peftctl.backends import processes
    from peftctl.console import Reporter
    from peftctl.training.checkpoints import restore
    from peftctl.training.stages import Workload, run_stages
    from tests.methods.conformance import PROBE
    from tests.training.helpers import rows

    with processes.first_goes_ahead():
        bench.section(tiny_model(run.method))
    case = bench.case(run.method, tiny_model(run.method))
    recipe = recipe_of(case, run, engine, out / run.name)
    work = RunDir(out / run.name)
    checkpoint = None
    if run.kind == "resume":
        straight = out / f"{run.method}-{run.storage}-straight"
        checkpoint = straight / "checkpoints" / f"checkpoint-{HALF}"
        if processes.is_first():
            shutil.copytree(straight, work.path, ignore=shutil.ignore_patterns("metrics.jsonl"))
    if processes.is_first():
        work.prepare(fresh=False, resume=True)
        work.write_text(work.recipe, "a run\n")
    processes.wait()
    load = Workload(recipe, case.method(), rows_of(case, rows), [], case.collate(case.method()), work, Reporter())
    model = case.apply(load.method, base_of(case, run.storage))
    if checkpoint is None:
        load.method.calibrate(model, (load.collate([row]) for row in load.train_rows[:4]))
    totals = run_stages(load, model, checkpoint)
    if totals.whole is not None:
        model = case.apply(load.method, base_of(case, run.storage))
        restore(model, load.method, *totals.whole, where=work.path)
    tensors = {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}
    if processes.is_first():
        tensors["logits"] = probe_logits(model.eval(), PROBE)
        save_file({name: t.contiguous() for name, t in tensors.items()}, out / f"{run.name}.safetensors")
        lines = [json.loads(line) for line in work.metrics.read_text().splitlines()]
        losses = [line.get("loss_loss", line["loss"]) for line in lines if "loss" in line]
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        return {"error": "", "losses": losses, "world": world}
    return {}


def tiny_model(method: str) -> str:
    """Return the tiny model that a method is tried on: the Llama where the method can have one."""
    from tests.methods.conformance_models import CASES

    return next(model for name, model in CASES if name == method)


def rows_of(case: Any, rows: Any) -> list[Any]:
    """Return rows that do not divide evenly into steps."""
    from tests.methods.conformance_models import MODELS

    if case.model in ("llama", "opt"):
        return rows(3 * ROWS_A_STEP - 3)
    made = MODELS[case.model].rows()
    return (made * 6)[: 3 * ROWS_A_STEP - 3]


def recipe_of(case: Any, run: Run, engine: str, out: Path) -> Any:
    """Return the case's recipe for one process, or for one of two."""
    from peftctl.recipe.schema import BackendSection, QuantizationSection

    bits = {"nf4": 4, "int8": 8}.get(run.storage)
    alone = engine == "single"
    train = {
        "output_dir": str(out), "max_steps": STEPS, "save_steps": HALF, "logging_steps": 1, "seed": 0,
        "batch_size": ROWS_A_STEP if alone else 2, "gradient_accumulation": 1 if alone else 2,
        "gradient_checkpointing": run.kind == "checkpointing", "learning_rate": 1e-3, "max_grad_norm": 1.0,
    }  # fmt: skip
    backend = BackendSection()
    if engine.startswith("zero"):
        backend = BackendSection(name="deepspeed", config=str(ROOT / "configs" / "deepspeed" / f"{engine}.json"))
    dtype = "bfloat16" if run.storage == "bfloat16" else "float32"
    return case.recipe.model_copy(
        update={
            "model": case.recipe.model.model_copy(update={"dtype": dtype}),
            "train": case.recipe.train.model_copy(update=train),
            "quantization": QuantizationSection(bits=bits) if bits else QuantizationSection(),
            "backend": backend,
        }
    )


def base_of(case: Any, storage: str) -> Any:
    """Return a new base in a storage."""
    import torch

    from peftctl.models.load import load_model
    from peftctl.recipe.schema import QuantizationSection
    from tests.methods.conformance_models import head_of

    bits = {"nf4": 4, "int8": 8}.get(storage)
    if bits is None:
        return case.base(storage)
    torch.manual_seed(0)
    section = case.bench.section(case.model)
    quantization = QuantizationSection(bits=bits)
    return load_model(section, device="cpu", quantization=quantization, head=head_of(case.model))


if __name__ == "__main__":
    main()
