"""Tiny earlier runs for methods that build on finished ones; shipped recipes name runs that nobody has trained here."""

import torch
import transformers
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn

from peftctl.methods import pfeiffer
from peftctl.methods._lora import TASK_TYPES
from peftctl.methods._prompts import prompt_tuning_model
from peftctl.methods._rows import linear_layers
from peftctl.methods.base import Context
from peftctl.models.load import AUTO_CLASSES
from peftctl.recipe.schema import CLASSIFICATION, DataSection, ModelSection, Recipe, TrainSection
from peftctl.tuners.sparse_delta import SparseDeltaConfig, place


def write_prompt(folder, base, tokens, seed=0, task="causal_lm", spread=0.2):
    """Write a plain prompt of n tokens, as peft saves one; return its folder and its values."""
    model = prompt_tuning_model(base, tokens, task)
    table = model.prompt_encoder["default"].embedding.weight.data
    table.copy_(spread * torch.randn(table.shape, generator=torch.Generator().manual_seed(seed)))
    model.save_pretrained(folder)
    return folder, table.clone()


def write_decoder(folder, dim, hidden, size, seed=0):
    """Write the decoder of an intrinsic prompt as a run keeps it; return its folder."""
    torch.manual_seed(seed)
    decoder = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, size))
    (folder / "parts").mkdir(parents=True)
    save_file(decoder.state_dict(), folder / "parts" / "decoder.safetensors")
    return folder


def _prompts(folder, keys, task, base):
    runs = [
        write_prompt(folder / f"prompt-{i}", base(), keys.num_virtual_tokens, i, task)[0]
        for i in range(len(keys.prompts))
    ]
    return {"prompts": [str(run) for run in runs]}


def _decoder(folder, keys, task, base):
    size = keys.num_virtual_tokens * base().get_input_embeddings().weight.shape[1]
    run = folder / "decoder"
    if not run.is_dir():
        write_decoder(run, keys.intrinsic_dim, keys.hidden, size)
    return {"prompts": [], "decoder": str(run)}


def write_adapter(folder, base, seed=0, task="causal_lm", chosen=None, spread=0.2):
    """Write a bottleneck adapter, a Pfeiffer one where no other method is given, with random values; return its folder.

    Args:
        folder: Where to.
        base: A model; of a bare encoder that with a head for the task.
        seed: Of the values.
        task: Of the recipe.
        chosen: A configured method of bottleneck adapters.
        spread: Standard deviation of the values.
    """
    if task in CLASSIFICATION:
        base = getattr(transformers, AUTO_CLASSES[task]).from_config(base.config)
    chosen = chosen or pfeiffer.Method(pfeiffer.Config(bottleneck=4 + 2 * seed))
    recipe = Recipe(
        model=ModelSection(name_or_path="tiny", dtype="float32", task=task),
        method=chosen.config,
        data=DataSection(train="rows.jsonl"),
        train=TrainSection(output_dir="run"),
    )
    model = chosen.apply(base, Context(recipe))
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "bottleneck_adapter" in name:
            p.data.copy_(spread * torch.randn(p.shape, generator=generator))
    chosen.export(model).save_pretrained(folder)
    return folder


def _adapters(folder, keys, task, base):
    runs = [folder / f"adapter-{i}" for i in range(len(keys.adapters))]
    for i, run in enumerate(runs):
        if not run.is_dir():
            write_adapter(run, base(), i, task)
    return {"adapters": [str(run) for run in runs]}


def _mask(folder, keys, task, base):
    """Write a mask of every second entry of every layer."""
    if (folder / "mask").is_dir():
        return {"mask_from": str(folder / "mask")}
    base = base()
    if task in CLASSIFICATION:
        base = getattr(transformers, AUTO_CLASSES[task]).from_config(base.config)
    layers = linear_layers(base, keys.target_modules, keys.name)
    mask = {name: torch.arange(0, layer.weight.numel(), 2) for name, layer in layers.items()}
    counts = {name: len(entries) for name, entries in mask.items()}
    model = get_peft_model(base, SparseDeltaConfig(counts=counts, task_type=TASK_TYPES[task]))
    place(model, mask)
    model.save_pretrained(folder / "mask")
    return {"mask_from": str(folder / "mask")}


RUNS = {"adapter_fusion": _adapters, "intrinsic_prompt_tuning": _prompts}
"""Method -> function of a folder, its `method:` section, a task and what makes a base, which writes the runs that the
section names and returns the keys that name them."""
ONE_STAGE = RUNS | {"diff_pruning": _mask, "intrinsic_prompt_tuning": _decoder}
"""The same for a run in one stage, where one with several would train other tensors from stage to stage."""
