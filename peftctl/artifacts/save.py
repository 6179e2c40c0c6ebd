"""Write the result of a run, checked: adapter/ or model/ with tokenizer, model card and peftctl.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from peftctl.artifacts import manifest as manifests
from peftctl.artifacts.checks import check_weights
from peftctl.artifacts.manifest import ArtifactInfo
from peftctl.artifacts.model_card import changed_config, head_record, render_card
from peftctl.artifacts.rundir import RunDir, staged
from peftctl.models.aliases import resolve
from peftctl.recipe.schema import Recipe
from peftctl.tuners.task_tensors import become, tasks_of

MAX_SHARD = "5GB"


def save_artifact(
    exported: Any, tokenizer: Any, run: RunDir, info: ArtifactInfo, *, max_shard_size: str = MAX_SHARD
) -> Path:
    """Write what `Method.export` returned into the run directory.

    Args:
        exported: A PeftModel (goes to adapter/), a PreTrainedModel (goes to model/), or None: the tokenizer with its
            template is the whole result (goes to adapter/).
        tokenizer: As the run used it.
        run: Where to.
        info: What the model card and peftctl.json say.
        max_shard_size: Largest file of a whole model.

    Returns:
        The directory that was written; of several tasks the default one's, with the others' in folders of their names.

    Raises:
        ArtifactError: A post-condition does not hold: keys, sizes, finite values. Nothing was written.
        RunError: The disk is full.
    """
    target = run.model if isinstance(exported, PreTrainedModel) else run.adapter
    changed = changed_config(exported, info)
    head, template = head_record(exported), tokenizer.chat_template
    tasks = tasks_of(exported)
    names = list(tasks.tensors) if tasks else []
    manifest = manifests.build(info.recipe, info.base_fingerprint, template, changed, head, names)
    with staged(target) as folder:
        folder.mkdir()
        if isinstance(exported, PreTrainedModel):
            exported.save_pretrained(folder, max_shard_size=max_shard_size)
            check_weights(folder)
        elif exported is not None:
            _save_adapter(exported, folder, info.recipe)
        if tasks:
            _save_tasks(exported, tokenizer, folder, manifest, info)
            manifest = manifests.of_task(manifest, tasks.default, alone=False)
        _save_rest(exported, tokenizer, folder, manifest, info)
    return target


def save_parts(parts: Mapping[str, Mapping[str, torch.Tensor]], run: RunDir) -> None:
    """Write what `Method.parts` returned into parts/ of the run; nothing where there is none.

    Raises:
        RunError: The disk is full.
    """
    if not parts:
        return
    with staged(run.parts) as folder:
        folder.mkdir()
        for name, tensors in parts.items():
            whole = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
            save_file(whole, folder / f"{name}.safetensors")


def _save_tasks(exported: Any, tokenizer: Any, folder: Path, manifest: dict[str, Any], info: ArtifactInfo) -> None:
    """Write the adapter of every task but the default one, whole, into a folder of its name."""
    tasks = tasks_of(exported)
    assert tasks is not None
    for task in tasks.tensors:
        if task != tasks.default:
            become(exported, task)
            (folder / task).mkdir()
            _save_adapter(exported, folder / task, info.recipe)
            _save_rest(exported, tokenizer, folder / task, manifests.of_task(manifest, task, alone=True), info)
    become(exported, tasks.default)


def _save_rest(exported: Any, tokenizer: Any, folder: Path, manifest: dict[str, Any], info: ArtifactInfo) -> None:
    tokenizer.save_pretrained(folder)
    manifests.write(folder, manifest)
    (folder / "README.md").write_text(render_card(exported, info, manifest), encoding="utf-8")


def _save_adapter(model: Any, folder: Path, recipe: Recipe) -> None:
    from peft import get_peft_model_state_dict

    config = model.peft_config["default"]
    config.base_model_name_or_path = manifests.portable_name(resolve(recipe.model.name_or_path))
    config.revision = recipe.model.revision
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    # Embeddings that are not trained are the base's, and peft would copy them where a target is one.
    model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
    check_weights(folder, expected)
