"""Load an artefact of any kind for inference: what peftctl wrote, what plain peft wrote, and models."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from transformers.utils import is_flash_attn_2_available

from peftctl.artifacts.checks import ADAPTER_WEIGHTS, read_keys
from peftctl.artifacts.dtypes import stored_dtype
from peftctl.artifacts.locate import ADAPTER_CONFIG, Artefact, fetched, locate, of_task
from peftctl.artifacts.manifest import read_json
from peftctl.errors import ArtifactError, UsageError
from peftctl.models.classifier import Head
from peftctl.models.fingerprint import directory_fingerprint, weights_fingerprint
from peftctl.models.load import language_task, load_model, load_tokenizer
from peftctl.models.quantize import is_quantized
from peftctl.models.rope import set_rope
from peftctl.models.source import weights_folder
from peftctl.models.vocabulary import fit_vocabulary
from peftctl.recipe.schema import CLASSIFICATION, ModelSection, QuantizationSection, Task

__all__ = ["Artefact", "load", "locate"]


def load(
    target: str | Path | Sequence[str | Path],
    *,
    task: str | None = None,
    dtype: str | None = None,
    device: str | torch.device | None = None,
) -> tuple[Any, Any]:
    """Load an artefact of any kind, in eval mode.

    Args:
        target: See `locate`; several adapters of one base, as a list, come on one model, see `several.load_several`,
            and of prompts `several.load_prompts`.
        task: Which task of an artefact with several, by its name or its number; left out, the default one.
        dtype: Of the weights; left out, what an adapter was trained on, and what a model is stored in.
        device: Where to put it; left out, the CPU.

    Returns:
        (model, tokenizer).

    Raises:
        UsageError: There is no such target or task.
        ArtifactError: Files are damaged, or the base is not the one that the adapter was trained on.
    """
    if not isinstance(target, str | Path):
        from peftctl.artifacts.several import are_prompts, load_prompts, load_several

        if task is None and are_prompts(target):
            several = load_prompts(target, dtype=dtype, device=device)
        else:
            several = load_several(target, task=task, dtype=dtype, device=device)
        return several.model, several.tokenizer
    artefact = fetched(locate(target))
    if task is not None:
        artefact = of_task(artefact, task)
    if not artefact.is_adapter:
        section = ModelSection(
            name_or_path=str(artefact.folder or target),
            task=artefact.manifest.get("task", "causal_lm"),
            **_own_settings(artefact),
        )
        section = _with_task(section, artefact)
        return load_model(section, dtype=dtype or stored_dtype(section), device=device), load_tokenizer(section)
    model = load_base(artefact, dtype=dtype, device=device)
    return attach(model, artefact), tokenizer_of(artefact)


def base_section(artefact: Artefact) -> ModelSection:
    """Return how the base of an adapter is loaded, in the type that it was trained in.

    Raises:
        ArtifactError: The adapter names no base.
    """
    if artefact.base is None:
        raise ArtifactError(f"{artefact.target}: {ADAPTER_CONFIG} names no base model; add base_model_name_or_path")
    record = artefact.manifest.get("base", {})
    section = ModelSection(
        name_or_path=artefact.base,
        task=artefact.manifest.get("task", "causal_lm"),
        revision=record.get("revision"),
        **_own_settings(artefact),
    )
    section = _with_task(section, artefact)
    return section.model_copy(update={"dtype": record.get("dtype") or stored_dtype(section)})


def load_base(
    artefact: Artefact,
    *,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    base: str | None = None,
    quantized: bool = True,
) -> Any:
    """Load the base model of an adapter and check that it is the one the adapter was trained on.

    Args:
        artefact: An adapter.
        dtype: Of the weights; left out, what the adapter was trained on.
        device: Where to put it.
        base: Where it lies; left out, where the artefact says.
        quantized: Quantise it where it was quantised in training; False keeps the original weights.

    Raises:
        ArtifactError: It is another base.
    """
    section = base_section(artefact)
    if base is not None:
        section = section.model_copy(update={"name_or_path": base, "revision": None})
    storage = quantization_of(artefact) if quantized else None
    try:
        model = load_model(
            section, dtype=dtype or section.dtype, device=device, quantization=storage, head=head_of(artefact)
        )
    except UsageError as error:
        raise UsageError(f"{artefact.target}: its base model: {error}") from error
    if rope := artefact.manifest.get("config_changes", {}).get("rope_parameters"):
        set_rope(model, rope)
    expected = artefact.manifest.get("base", {}).get("fingerprint")
    if expected is None:
        return model
    found = base_fingerprint(section, model)
    if found != expected and dtype not in (None, section.dtype):
        # float32 weights rounded to float16 can have another fingerprint: compare in the type of the record.
        found = weights_fingerprint(load_model(section))
    if found != expected and quantization_of(artefact):  # that of the files was recorded
        found = directory_fingerprint(weights_folder(section))
    if found != expected:
        raise ArtifactError(
            f"{artefact.target}: is an adapter of another base: it was trained on {artefact.base} with fingerprint "
            f"{expected[:12]}, {section.name_or_path} has {found[:12]}"
        )
    return model


def base_fingerprint(section: ModelSection, model: Any) -> str:
    """Return the fingerprint of a base: of its weights, or of its files where the weights in memory are quantised."""
    return directory_fingerprint(weights_folder(section)) if is_quantized(model) else weights_fingerprint(model)


def quantization_of(artefact: Artefact) -> QuantizationSection | None:
    """Return how the base was quantised while an adapter was trained; None where it was not."""
    record = artefact.manifest.get("base", {}).get("quantization")
    return QuantizationSection(**record) if record else None


def head_of(artefact: Artefact) -> Head | None:
    """Return what the head of a classifier's adapter was made for; None for language models.

    An adapter of another tool holds a head without names for its classes.
    """
    if "head" in artefact.manifest:
        return Head(**artefact.manifest["head"])
    if artefact.manifest or artefact.folder is None or _peft_task(artefact) not in CLASSIFICATION:
        return None
    with safe_open(artefact.folder / ADAPTER_WEIGHTS, framework="pt") as tensors:
        heads = [
            name
            for name in tensors.keys()  # noqa: SIM118  # not a dictionary
            if name.endswith(".weight") and {"classifier", "score"} & set(name.split("."))
        ]
        classes = tensors.get_slice(heads[-1]).get_shape()[0] if heads else 2
    return Head([f"LABEL_{i}" for i in range(classes)])


def _peft_task(artefact: Artefact) -> Task | None:
    """Return what an adapter without a record of ours is for, where its own settings say so."""
    if artefact.folder is None or not artefact.is_adapter:
        return None
    kind = read_json(artefact.folder / ADAPTER_CONFIG).get("task_type")
    return {"SEQ_CLS": "seq_cls", "TOKEN_CLS": "token_cls"}.get(str(kind))  # type: ignore[return-value]


def attach(base: Any, artefact: Artefact, name: str = "default") -> Any:
    """Put an adapter on its base; the base itself where the artefact is only a template.

    Args:
        base: The base model, or a PeftModel on it that holds adapters under other names.
        artefact: The adapter.
        name: What the adapter is called in the model.

    Raises:
        ArtifactError: Its files are damaged, or do not fit the base.
    """
    if not artefact.has_weights:
        return base
    from peft import PeftModel, get_peft_model_state_dict

    import peftctl.tuners  # noqa: F401  # peft learns our types of adapters

    if not isinstance(base, PeftModel):
        fit_vocabulary(base, _rows_needed(artefact))
    folder = artefact.folder
    assert folder is not None  # an adapter with weights lies in a directory
    present = read_keys(folder / ADAPTER_WEIGHTS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft warns of (missing keys, another base) is checked here
            if isinstance(base, PeftModel):
                base.load_adapter(str(folder), name, is_trainable=False)
                model = base
            else:
                model = PeftModel.from_pretrained(base, str(folder), name, is_trainable=False)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtifactError(f"{artefact.target}: the adapter does not fit {artefact.base}: {reason}") from error
    wanted = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    wrong = sorted((wanted - present) | (present - wanted - set(model.state_dict())))
    if wrong:
        raise ArtifactError(
            f"{folder / ADAPTER_WEIGHTS}: its tensors are not those of {ADAPTER_CONFIG}: {len(wrong)} differ, "
            f"e.g. {wrong[0]}"
        )
    return model.eval()


def _with_task(section: ModelSection, artefact: Artefact) -> ModelSection:
    """Return the section with what a model without a record of ours does."""
    if "task" in artefact.manifest:
        return section
    return section.model_copy(update={"task": _peft_task(artefact) or language_task(section)})


def tokenizer_of(artefact: Artefact) -> Any:
    """Return the tokenizer that lies with an adapter, else that of its base."""
    if _has_tokenizer(artefact):
        return load_tokenizer(ModelSection(name_or_path=str(artefact.folder)))
    return load_tokenizer(base_section(artefact))


def _has_tokenizer(artefact: Artefact) -> bool:
    folder = artefact.folder
    return folder is not None and any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json"))


def _rows_needed(artefact: Artefact) -> int:
    """Return how many rows the base's vocabulary had at least when the adapter was trained: 0 where nothing tells.

    Adapters of other tools do not say it; theirs is as large as the tokenizer beside them.
    """
    if artefact.manifest:
        return int(artefact.manifest.get("config_changes", {}).get("vocab_size", 0))
    return len(tokenizer_of(artefact)) if _has_tokenizer(artefact) else 0


def _own_settings(artefact: Artefact) -> dict[str, Any]:
    """Return what the user's own run says on how to load its model.

    Consent to run a model's code counts only there: an artefact that travels can't carry it. The same attention kernel
    keeps half-type logits equal to the run's; another one changes them by some percent.
    """
    if artefact.recipe is None:
        return {}
    try:
        model = yaml.safe_load(artefact.recipe.read_text(encoding="utf-8"))["model"]
        trusted, kernel = model.get("trust_remote_code") is True, model.get("attn_implementation")
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return {}
    usable = kernel in ("eager", "sdpa") or (kernel == "flash_attention_2" and is_flash_attn_2_available())
    return {"trust_remote_code": trusted, "attn_implementation": kernel if usable else None}
