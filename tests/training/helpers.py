"""A workload on a tiny model, without files or tokenizer work."""

import random

import torch

from peftctl.artifacts.rundir import RunDir
from peftctl.console import Reporter
from peftctl.data.collate import Collator
from peftctl.data.encode import EncodedRow
from peftctl.methods.base import Context
from peftctl.methods.lora import Config, Method
from peftctl.recipe.schema import DataSection, ModelSection, Recipe, TrainSection
from peftctl.training.stages import Workload, run_stages
from tests.tiny import tiny_llama, tiny_tokenizer


def rows(count=24, seed=0):
    """Rows of 6 to 20 tokens whose second half is supervised."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        ids = [draw.randrange(4, 390) for _ in range(draw.randrange(6, 21))]
        labels = [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]
        made.append(
            EncodedRow(input_ids=ids, labels=labels, where=f"rows:{i + 1}", truncated=False, dropped_reason=None)
        )
    return made


def workload(folder, method=None, *, reporter=None, dtype="float32", **train):
    """Return a Workload over a fresh run directory in `folder`."""
    method = method or Method(Config(r=4, dropout=0.1, target_modules="all-linear"))
    settings = {
        "max_steps": 6,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "scheduler": "linear",
        "logging_steps": 1,
    } | train
    recipe = Recipe(
        model=ModelSection(name_or_path="tiny", dtype=dtype),
        method=method.config,
        data=DataSection(train="rows.jsonl"),
        train=TrainSection(output_dir=str(folder), **settings),
    )
    run = RunDir(folder)
    run.prepare(fresh=False, resume=True)
    run.write_text(run.recipe, "a run\n")
    return Workload(
        recipe, method, rows(), rows(5, seed=1), Collator(tiny_tokenizer(), None), run, reporter or Reporter()
    )


def train(work, checkpoint=None, model=None):
    """Train a workload on a tiny Llama; return (model, totals)."""
    torch.manual_seed(0)
    model = work.method.apply(model or tiny_llama(), Context(work.recipe))
    return model, run_stages(work, model, checkpoint)


def trained_tensors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
