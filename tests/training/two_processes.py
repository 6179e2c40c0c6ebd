"""Trains a workload on a tiny Llama in this process, one of WORLD_SIZE; the first one writes what came out.

python -m torch.distributed.run --nproc_per_node 2 tests/training/two_processes.py OUT [ZERO_CONFIG]
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from peftctl.methods.base import Context, Stage
from peftctl.methods.lora import Config, Method
from peftctl.recipe.schema import BackendSection
from peftctl.training import stages
from peftctl.training.trainer import MethodTrainer
from tests.tiny import tiny_llama
from tests.training.helpers import workload


class TwoStages(Method):
    """LoRA whose lower half trains in a first stage and whose upper half trains in the main one."""

    def stages(self):
        return (Stage("lower", steps=3), Stage())

    def enter(self, model, stage):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_((stage.name == "lower") == (".layers.0." in name or ".layers.1." in name))


def main(out, config=None):
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    # Rows of a step are dealt to processes: the global batch is 4 rows in either case.
    work = workload(
        Path(out) / f"rank{rank}", TwoStages(Config(r=4, target_modules="all-linear")), batch_size=4 // world
    )
    if config:
        backend = BackendSection(name="deepspeed", config=config)
        work = replace(work, recipe=work.recipe.model_copy(update={"backend": backend}))
    seen = []
    train = MethodTrainer.train

    def watched(trainer, **options):
        result = train(trainer, **options)
        owned = sorted(n for n, p in trainer.model.named_parameters() if p.requires_grad)
        seen.append((type(trainer.model_wrapped).__name__, trainer.args.world_size, owned))
        return result

    MethodTrainer.train = watched
    torch.manual_seed(0)
    model = work.method.apply(tiny_llama(), Context(work.recipe))
    work.method.calibrate(model, (work.collate([row]) for row in work.train_rows))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    totals = stages.run_stages(work, model, None)
    if rank == 0:
        after = {name: p.detach() for name, p in model.named_parameters()}
        moved = [name for name, p in before.items() if not torch.equal(p, after[name])]
        content = {
            "seen": seen, "moved": moved, "tensors": after,
            "tokens": totals.train_tokens, "supervised": totals.supervised_tokens, "steps": totals.steps,
            "lines": work.run.metrics.read_text(),
        }  # fmt: skip
        torch.save(content, Path(out) / "result.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
