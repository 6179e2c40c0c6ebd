"""Try every method with every storage of the base through every engine; keep what holds in peftctl/methods/matrix.json.

    python scripts/probe_matrix.py [METHOD ...] [--engines single ddp zero2 zero3 fsdp] [--storages float32 nf4]

An engine is one launch of two processes that goes through the methods on tiny models. Two processes x batch 2 x
accumulation 2 must come to what one process with batch 8 comes to: the loss of every step, every trained tensor, the
logits; a run that goes on from a checkpoint too; and with gradient checkpointing too, where the card claims it. Rows
do not divide evenly. A cell is the reason why it does not hold, or nothing.

Only methods whose code has changed since are tried again; `peftctl methods --matrix` shows the table, `check` and
`train` refuse what is not proven.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts and tests, from wherever this is run
from scripts.two_processes import ROOT, command, environment

WORKER, TODO = ROOT / "scripts" / "probe_worker.py", "todo.json"
ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp")
STORAGES = ("float32", "bfloat16", "nf4", "int8")
SAME_LOSS = {"float32": 1e-4, "bfloat16": 0.02, "nf4": 0.02, "int8": 0.02}
"""Largest difference of a step's loss, nats. Half types and quantised bases round."""
SAME_CHANGE = {"float32": 0.02, "bfloat16": 0.65, "nf4": 0.3, "int8": 0.3}
"""Largest difference of what training has made of a tensor, as a share of the norm of its change in one process.

In bfloat16 up to 0.58 was seen: adamix, of whose experts each has few of the short run's steps.
"""
ROUNDED = {"logits": 2.0**-6, "weights": 2.0**-9}
"""And in bfloat16, as a share of their norm: logits (seen: 0.8 to 1.3 %), and weights that ZeRO keeps in 16 bits."""
SILENT = 120
"""Seconds without a result after which a run counts as hanging."""


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
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["single", "ddp", "zero2", "zero3", "fsdp"])
    parser.add_argument("--storages", nargs="+", choices=STORAGES, default=list(STORAGES))
    parser.add_argument("--again", action="store_true", help="also what has not changed")
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
        launch(engine, fitting(engine, runs), folder / engine)
    cells: dict[str, dict[str, str]] = {method: {} for method in methods}
    for engine in engines:
        for run in fitting(engine, runs):
            key = f"{run.storage}/{engine}"
            why = compare(run, folder / "single", folder / engine)
            if why or key not in cells[run.method]:
                cells[run.method][key] = cells[run.method].get(key) or why
    return cells


def fitting(engine: str, runs: Sequence[Run]) -> list[Run]:
    """Return the runs that recipes may have: quantised weights are not divided by FSDP."""
    return [run for run in runs if engine != "fsdp" or run.storage not in ("nf4", "int8")]


def launch(engine: str, runs: list[Run], out: Path) -> None:
    """Go through the runs in one launch; one that hangs is noted, and the rest launched anew."""
    out.mkdir(parents=True, exist_ok=True)
    left = [run for run in runs if not (out / f"{run.name}.json").is_file()]
    while left:
        (out / TODO).write_text(json.dumps([vars(run) for run in left]))
        program = command(engine, WORKER, engine, out)
        with (out / "log.txt").open("a") as log:
            process = subprocess.Popen(program, env=environment(), cwd=ROOT, stdout=log, stderr=log)
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
        if time.monotonic() - changed > SILENT:
            process.terminate()
            process.wait()
            return "hangs"
    return "ended"


def compare(run: Run, single: Path, other: Path) -> str:
    """Return why a run of an engine is not what one process came to; nothing where it is."""
    import torch
    from safetensors.torch import load_file

    straight = f"{run.method}-{run.storage}-straight"
    expected = json.loads((single / f"{straight}.json").read_text())
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
    before, tensors, others = (
        load_file(folder / f"{name}.safetensors")
        for folder, name in ((single, f"{straight}.before"), (single, straight), (other, run.name))
    )
    if tensors.keys() != others.keys():
        return f"{run.kind}: other tensors train"
    for name, tensor in tensors.items():
        if others[name].shape != tensor.shape:
            return f"{run.kind}: {name} has shape {tuple(others[name].shape)}"
        if name.endswith("k_proj.bias"):  # it shifts all scores of a query alike: its gradient is nothing but rounding
            continue
        start = before[name] if before[name].shape == tensor.shape else torch.zeros_like(tensor)  # a later stage's
        change = (tensor - start).norm().clamp_min(1e-6 * tensor.norm())
        rounded = ROUNDED["logits" if name == "logits" else "weights"] * tensor.norm() * (run.storage == "bfloat16")
        off = (others[name] - tensor).norm()
        if not off <= SAME_CHANGE[run.storage] * change + rounded:
            return f"{run.kind}: {name} differs by {float(off / change):.2g} of its change"
    return f"merge: {found['merge']}" if found.get("merge") else ""


if __name__ == "__main__":
    main()
