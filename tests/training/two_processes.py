"""Trains a workload on a tiny Llama in this process, one of WORLD_SIZE; the first one writes what came out.

python -m torch.distributed.run --nproc_per_node 2 tests/training/two_processes.py OUT [ZERO_CONFIG [nf4]]
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from peftctl.errors import RunError
from peftctl.methods.base import Context, Stage
from peftctl.methods.lora import Config, Method
from peftctl.models.load import load_model
from peftctl.recipe.schema import BackendSection, ModelSection, QuantizationSection
from peftctl.training import stages
from peftctl.training.trainer import MethodTrainer
from tests.tiny import save_tiny, tiny_llama
from tests.training.helpers import workload


class Diverges(Method):
    """LoRA whose loss is NaN on the batches that hold a token, in the process that has them."""

    token = 399  # no row has it of itself

    def loss(self, model, batch, forward):
        bad = float("nan") if (batch["input_ids"] == self.token).any() else 1.0
        return {"loss": super().loss(model, batch, forward)["loss"] * bad}


class TwoStages(Diverges):
    """The lower half trains in a first stage and the upper half in the main one."""

    def stages(self, recipe):
        return (Stage("lower", steps=3), Stage())

    def enter(self, model, stage, batches):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_((stage.name == "lower") == (".layers.0." in name or ".layers.1." in name))


def quantised_bytes(model):
    """Return the bytes of quantised weights that this process holds, and those of the whole ones."""
    held = whole = 0
    for p in model.parameters():
        if p.dtype is torch.uint8 and hasattr(p, "ds_tensor"):
            held += p.ds_tensor.nbytes + p.data.nbytes
            whole += p.ds_numel * p.element_size()
    return held, whole


def quantised_llama(folder):
    """Return the tiny Llama from disk, in 4 bits."""
    section = ModelSection(name_or_path=str(folder), dtype="float32")
    return load_model(section, device="cpu", quantization=QuantizationSection(bits=4))


def main(out, config=None, storage="float32"):
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    # Rows of a step are dealt to processes: the global batch is 4 rows in either case.
    method, on_nan = (Diverges, "stop") if storage == "nf4" else (TwoStages, "skip")
    work = workload(
        Path(out) / f"rank{rank}", method(Config(r=4, target_modules="all-linear")),
        batch_size=4 // world, on_nan=on_nan,
    )  # fmt: skip
    work.train_rows[5].input_ids[1] = Diverges.token
    if config:
        backend = BackendSection(name="deepspeed", config=config)
        work = replace(work, recipe=work.recipe.model_copy(update={"backend": backend}))
    seen, shares = [], []
    train = MethodTrainer.train

    def watched(trainer, **options):
        try:
            result = train(trainer, **options)
        finally:
            shares.append(quantised_bytes(trainer.model))
        owned = sorted(n for n, p in trainer.model.named_parameters() if p.requires_grad)
        seen.append((type(trainer.model_wrapped).__name__, trainer.args.world_size, owned))
        return result

    MethodTrainer.train = watched
    torch.manual_seed(0)
    base = quantised_llama(save_tiny(Path(out) / f"tiny{rank}")) if storage == "nf4" else tiny_llama()
    model = work.method.apply(base, Context(work.recipe))
    work.method.calibrate(model, (work.collate([row]) for row in work.train_rows))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        totals = stages.run_stages(work, model, None)
    except RunError as error:
        if rank == 0:
            kept = load_file(work.run.latest_checkpoint() / "trainable.safetensors")
            torch.save({"error": str(error), "kept": kept, "shares": shares}, Path(out) / "result.pt")
        return
    if rank == 0:
        after = {name: p.detach() for name, p in model.named_parameters() if p.shape == before[name].shape}
        moved = [name for name, p in after.items() if not torch.equal(p, before[name])]
        content = {
            "seen": seen, "shares": shares, "moved": moved, "tensors": after,
            "tokens": totals.train_tokens, "supervised": totals.supervised_tokens, "steps": totals.steps,
            "lines": work.run.metrics.read_text(),
        }  # fmt: skip
        torch.save(content, Path(out) / "result.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
