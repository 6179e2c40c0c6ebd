"""`method.init_from`: training goes on from the weights of a finished adapter of the same shape."""

from __future__ import annotations

from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from peftctl.artifacts.belonging import finished_adapter, peft_settings
from peftctl.artifacts.checks import ADAPTER_WEIGHTS, read_keys
from peftctl.artifacts.locate import Artefact
from peftctl.errors import ArtifactError, UsageError
from peftctl.methods.base import AdapterConfig
from peftctl.recipe.schema import Recipe

KEY = "method.init_from"

# Settings of a peft config that do not change what a given set of tensors computes; targets show in the tensors' names.
_FREE = {
    "base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_version",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
    "lora_dropout", "vera_dropout", "init_lora_weights", "init_weights", "runtime_config", "ensure_weight_tying",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip


def start_of(recipe: Recipe) -> Artefact | None:
    """Return the adapter that a recipe's training starts from; None where it starts anew.

    Raises:
        UsageError: There is no such finished adapter.
    """
    target = recipe.method.init_from if isinstance(recipe.method, AdapterConfig) else None
    return None if target is None else finished_adapter(target, KEY)


def refuse_other_shape(start: Artefact, recipe: Recipe, model: Any) -> None:
    """Raise where the finished adapter is not of the kind and shape that the recipe attaches.

    Only the adapter's settings and the headers of its weights are read.

    Args:
        start: The finished adapter.
        recipe: What is to be trained.
        model: The PeftModel that the recipe's method makes, on the meta device or with weights.

    Raises:
        UsageError: The method, a setting, the targets or a shape differs.
        ArtifactError: Files of the adapter are damaged.
    """
    theirs, ours = peft_settings(start).to_dict(), model.peft_config["default"].to_dict()
    if theirs.get("peft_type") != ours.get("peft_type"):
        method = start.manifest.get("method", theirs.get("peft_type"))
        raise UsageError(f"{KEY}: {start.target} was trained with {method}, this recipe has {recipe.method.name}")
    for name in sorted((theirs.keys() | ours.keys()) - _FREE):
        mine, other = _plain(ours.get(name)), _plain(theirs.get(name))
        if mine != other:
            key = _recipe_key(name, recipe)
            raise UsageError(f"{KEY}: {start.target} has {key} {other}, this recipe has {mine}; they must be equal")
    _refuse_other_tensors(start, model)


def refuse_other_weights(start: Artefact, recipe: Recipe, fingerprint: str) -> None:
    """Raise where the base that was loaded is not the one that the finished adapter was trained on.

    For bases whose files could not be looked at before; weights of two types can have two fingerprints.

    Raises:
        UsageError: It is another.
    """
    record = start.manifest.get("base", {})
    if record.get("dtype") == recipe.model.dtype and record.get("fingerprint") not in (None, fingerprint):
        raise UsageError(
            f"{KEY}: {start.target} is an adapter of another base: it was trained on {record['name']} with fingerprint "
            f"{record['fingerprint'][:12]}, {recipe.model.name_or_path} has {fingerprint[:12]}"
        )


def load_start(start: Artefact, model: Any) -> None:
    """Copy the finished adapter's tensors into a model whose adapter is attached and fresh.

    Raises:
        ArtifactError: The files are damaged, or changed since they were checked.
    """
    from peft import set_peft_model_state_dict

    assert start.folder is not None  # a finished adapter lies in a directory
    file = start.folder / ADAPTER_WEIGHTS
    wanted = _shapes_of(model)
    try:
        tensors = {name: tensor for name, tensor in load_file(file).items() if name in wanted}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file}: is damaged or cut off ({error})") from error
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != wanted:
        raise ArtifactError(f"{file}: its tensors are no longer those that were checked; start again")
    set_peft_model_state_dict(model, tensors)


def _refuse_other_tensors(start: Artefact, model: Any) -> None:
    assert start.folder is not None  # a finished adapter lies in a directory
    file = start.folder / ADAPTER_WEIGHTS
    present, wanted = read_keys(file), _shapes_of(model)
    extra, missing = present - wanted.keys() - set(model.state_dict()), wanted.keys() - present
    if extra or missing:
        example, whose = (min(missing), "only this recipe") if missing else (min(extra), f"only {start.target}")
        raise UsageError(
            f"{KEY}: {start.target} has other targets than this recipe: {len(extra | missing)} tensors differ, "
            f"{whose} has {example}; give the same method.target_modules"
        )
    with safe_open(file, framework="pt") as tensors:
        for name, shape in wanted.items():
            found = tuple(tensors.get_slice(name).get_shape())
            if found != shape:
                raise UsageError(
                    f"{KEY}: {start.target} is an adapter of another base: its {name} is {found}, expected {shape}"
                )


def _shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of what an adapter file of this model holds."""
    from peft import get_peft_model_state_dict

    if model.active_peft_config.is_prompt_learning:  # peft computes what it would save, which meta tensors can't
        return {"prompt_embeddings": tuple(model.prompt_encoder["default"].embedding.weight.shape)}
    return {n: tuple(t.shape) for n, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}


def _plain(value: Any) -> Any:
    """Return a value in a form that compares alike whether it was read from a file or just made."""
    if isinstance(value, set | list | tuple):
        return sorted(value, key=str)
    return None if value == {} else value


def _recipe_key(name: str, recipe: Recipe) -> str:
    """Return what the recipe calls a peft setting, where it has it."""
    short = name.removeprefix("lora_")
    return f"method.{short}" if short in type(recipe.method).model_fields else name
