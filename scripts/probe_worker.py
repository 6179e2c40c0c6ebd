"""Goes through the runs that scripts/probe_matrix.py wants, in this process: alone, or one of two.

python -m torch.distributed.run --nproc_per_node 2 scripts/probe_worker.py ENGINE FOLDER
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from peftctl.artifacts import save
from peftctl.artifacts.checks import probe_logits
from peftctl.artifacts.dtypes import cast_weights
from peftctl.artifacts.manifest import ArtifactInfo
from peftctl.artifacts.merge import merge
from peftctl.artifacts.rundir import RunDir
from peftctl.backends import device, processes
from peftctl.cli import quiet_libraries
from peftctl.console import Reporter
from peftctl.models.load import load_model
from peftctl.recipe.schema import BackendSection, QuantizationSection, Recipe
from peftctl.recipe.write import dump_recipe
from peftctl.training.checkpoints import Whole, restore
from peftctl.training.precision import autocast_type
from peftctl.training.stages import Workload, run_stages
from scripts.probe_matrix import SILENT, TODO, Run
from scripts.two_processes import backend
from tests import tiny
from tests.methods.conformance import PROBE, Bench, Case
from tests.methods.conformance_models import CASES, MODELS, head_of
from tests.training.helpers import rows

STEPS, HALF, ROWS_A_STEP = 4, 2, 8
PROBED: dict[str, dict[str, Any]] = {
    "lisa": {"gamma": 1, "interval": 1},  # of two blocks, so that one rests
    "lora_drop": {"threshold": 0.5},  # so that layers share a pair
    "adamix": {"experts": 2},  # so that in a few steps each is drawn several times
    "adapter_drop": {"max_drop": 1},  # so that the lowest adapter rests in a step
    "far": {"retention": 0.5},  # so that some nodes stay
    "neft": {"ratio": 0.5},  # so that some rows stay
}
"""Method -> keys of its section that show more in a short run than those of its recipe."""
ROUNDED_AWAY = {("far", "bfloat16"), ("neft", "bfloat16")}
"""(method, storage) without them: which rows move most is there a matter of rounding."""


def main(engine: str, out: Path) -> None:
    quiet_libraries()
    processes.start()
    device.set_threads()
    bench = Bench(out / "bench")
    if not processes.is_first():  # the first one writes the tiny models
        tiny.save_tiny = lambda folder, *_: folder
    for content in json.loads((out / TODO).read_text()):
        run = Run(**content)
        straight = out / f"{run.method}-{run.storage}-straight.json"
        if run.kind != "straight" and json.loads(straight.read_text())["error"]:
            shutil.copy(straight, out / f"{run.name}.json") if processes.is_first() else None
            continue
        faulthandler.dump_traceback_later(SILENT - 10)  # where it hangs, into the log
        try:
            result = Trial(run, engine, bench, out).go()
        except Exception as error:
            traceback.print_exc()
            # An assertion says nothing but its line.
            line = (str(error).splitlines() or [traceback.extract_tb(error.__traceback__)[-1].line or ""])[0]
            noted = out / f"{run.name}.json"
            if not noted.is_file():  # by the other process, which this one has only lost
                noted.write_text(json.dumps({"error": f"{type(error).__name__}: {line}"[:200]}))
            os._exit(1)  # the engine is in no state to go on from, and the other process may wait for this one
        if processes.is_first():
            (out / f"{run.name}.json").write_text(json.dumps(result))
        gc.collect()
        processes.wait()
    processes.stop()


class Trial:
    """One run of the matrix.

    Args:
        run: Which.
        engine: What it goes through.
        bench: The tiny models.
        out: Where the run directory and what came out go.
    """

    def __init__(self, run: Run, engine: str, bench: Bench, out: Path):
        self.kind, self.storage, self.name, self.engine, self.out = run.kind, run.storage, run.name, engine, out
        self.straight = f"{run.method}-{run.storage}-straight"
        model = next(model for name, model in CASES if name == run.method)
        with processes.first_goes_ahead():  # it writes models and the runs that a method builds on
            bench.section(model)
            self.case: Case = bench.case(run.method, model)
            shown = {} if (run.method, run.storage) in ROUNDED_AWAY else PROBED.get(run.method, {})
            self.case.recipe = self.case.recipe_with("method", **shown)
        self.recipe = self._recipe()
        self.run = RunDir(out / run.name)

    def go(self) -> dict[str, Any]:
        """Train; return what came out where this is the first process, whose tensors are saved too."""
        checkpoint = self._prepare()
        case, method = self.case, self.case.method()

        def rebuild(whole: Whole) -> Any:
            rebuilt = case.apply(method, self._base())
            restore(rebuilt, method, *whole, where=self.run.path)
            return rebuilt

        load = Workload(self.recipe, method, self._rows(), [], case.collate(method), self.run, Reporter(), rebuild)
        model = case.apply(method, self._base())
        if checkpoint is None:
            method.calibrate(model, (load.collate([row]) for row in load.train_rows[:4]))
        if self.name == self.straight and self.engine == "single":
            self._keep(model, f"{self.name}.before")
        totals = run_stages(load, model, checkpoint)
        if totals.whole is not None:
            model = rebuild(totals.whole)
        if not processes.is_first():
            return {}
        self._keep(model, self.name)
        lines = [json.loads(line) for line in self.run.metrics.read_text().splitlines()]
        losses = [line.get("loss_loss", line["loss"]) for line in lines if "loss" in line]
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        merged = self._merge(method, model) if self.kind == "straight" and case.card.mergeable else ""
        return {"error": "", "losses": losses, "world": world, "merge": merged}

    def _prepare(self) -> Path | None:
        """Make the run directory; return the checkpoint to go on from."""
        if processes.is_first():
            if self.kind == "resume":
                shutil.copytree(
                    self.out / self.straight, self.run.path, ignore=shutil.ignore_patterns("metrics.jsonl", "adapter")
                )
            self.run.prepare(fresh=False, resume=True)
            self.run.write_text(self.run.recipe, dump_recipe(self.recipe, unread=self.case.method().unread))
        processes.wait()
        return self.out / self.straight / "checkpoints" / f"checkpoint-{HALF}" if self.kind == "resume" else None

    def _keep(self, model: Any, name: str) -> None:
        """Save what trains, and the logits."""
        tensors = {n: p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad}
        computed = autocast_type(self.recipe, self.case.method())
        with torch.autocast("cpu", torch.bfloat16, enabled=computed is not None):
            tensors["logits"] = probe_logits(model.eval(), PROBE).float()
        save_file({n: tensor.contiguous() for n, tensor in tensors.items()}, self.out / f"{name}.safetensors")

    def _merge(self, method: Any, model: Any) -> str:
        """Save the artefact and merge it, which compares with the unmerged model; return what is wrong, or nothing."""
        if method.autocast:
            cast_weights(model, device.dtype_of(self.recipe.model.dtype))
        info = ArtifactInfo(self.case.name, self.case.card, self.recipe, self.case.bench.fingerprint(self.case.model))
        save.save_artifact(method.export(model), self.case.tokenizer, self.run, info)
        try:
            merge(self.run.path, self.out / f"{self.name}-merged", dtype="float32")
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]
        finally:
            shutil.rmtree(self.out / f"{self.name}-merged", ignore_errors=True)
        return ""

    def _rows(self) -> list[Any]:
        """Return rows that do not divide evenly into steps."""
        count = 3 * ROWS_A_STEP - 3
        if self.case.model in ("llama", "opt"):
            return rows(count)
        return (MODELS[self.case.model].rows() * 6)[:count]

    @property
    def _bits(self) -> QuantizationSection:
        return QuantizationSection(bits={"nf4": 4, "int8": 8}.get(self.storage))

    def _recipe(self) -> Recipe:
        """Return the case's recipe for one process, or for one of two."""
        alone = self.engine == "single"
        train = {
            "output_dir": str(self.out / self.name), "max_steps": STEPS, "save_steps": HALF, "logging_steps": 1,
            "batch_size": ROWS_A_STEP if alone else 2, "gradient_accumulation": 1 if alone else 2, "seed": 0,
            "gradient_checkpointing": self.kind == "checkpointing", "learning_rate": 1e-3, "max_grad_norm": 1.0,
        }  # fmt: skip
        dtype = "bfloat16" if self.storage == "bfloat16" else "float32"
        case = self.case.recipe
        return case.model_copy(
            update={
                "model": case.model.model_copy(update={"dtype": dtype}),
                "train": case.train.model_copy(update=train),
                "quantization": self._bits,
                "backend": BackendSection(**backend(self.engine)),
            }
        )

    def _base(self) -> Any:
        """Return a new base in the run's storage."""
        if self._bits.bits is None:
            return self.case.base(self.storage)
        torch.manual_seed(0)
        section = self.case.bench.section(self.case.model)
        return load_model(section, device="cpu", quantization=self._bits, head=head_of(self.case.model))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
