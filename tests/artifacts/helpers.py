"""Adapters on tiny models, with random B so that they change something."""

from __future__ import annotations

from pathlib import Path

from tests.tiny import save_tiny, tiny_llama

ROWS = [[5, 6, 7, 8, 9, 10], list(range(20, 60)), [300, 2, 17, 90, 41]]


def make_recipe(base: str | Path, output: str | Path, *, dtype: str = "float32", method=None, task: str = "causal_lm"):
    from peftctl.methods.lora import Config
    from peftctl.recipe.schema import DataSection, ModelSection, Recipe, TrainSection

    return Recipe(
        model=ModelSection(name_or_path=str(base), dtype=dtype, task=task),
        method=method or Config(r=4, alpha=8),
        data=DataSection(train="train.jsonl"),
        train=TrainSection(output_dir=str(output)),
    )


def make_info(recipe, base_model, **facts):
    from peftctl.artifacts.manifest import ArtifactInfo
    from peftctl.methods import registry
    from peftctl.models.fingerprint import weights_fingerprint

    card = registry.get(recipe.method.name).card
    return ArtifactInfo(recipe.method.name, card, recipe, weights_fingerprint(base_model), facts)


def random_lora(base_model, *, std: float = 0.05, seed: int = 1, **config):
    """A LoRA over `base_model` whose A and B are both random."""
    import torch
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(base_model, LoraConfig(**options)).eval()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name or "modules_to_save" in name:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * std)
    return model


def lora_run(folder: Path, *, dtype: str = "float32", tie: bool = True, std: float = 0.05, **config):
    """Write base/ and run/ (recipe.yaml and adapter/) into a folder; return the run's path and its logits on ROWS."""
    from peftctl.artifacts.checks import probe_logits
    from peftctl.artifacts.rundir import RunDir
    from peftctl.artifacts.save import save_artifact
    from peftctl.models.load import load_model, load_tokenizer

    base = save_tiny(folder / "base", tiny_llama(tie=tie, dtype=dtype))
    recipe = make_recipe(base, folder / "run", dtype=dtype)
    plain = load_model(recipe.model)
    info = make_info(recipe, plain, steps=3, train_loss=1.25, data_fingerprint="feed" * 16)
    model = random_lora(plain, std=std, **config)
    run = RunDir(folder / "run")
    save_artifact(model, load_tokenizer(recipe.model), run, info)
    run.write_text(run.recipe, f"model:\n  name_or_path: {base}\n")
    return run, probe_logits(model, ROWS)
