"""Load base models and tokenizers: hub ids, directories, .gguf files and aliases; every failure is one line."""

from __future__ import annotations

import io
import warnings
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftctl.errors import ArtifactError, UsageError
from peftctl.models import shapes
from peftctl.models.classifier import Head, head_names, task_of_class
from peftctl.models.quantize import keep_packing, library_config, refuse_without_library
from peftctl.models.source import Source, explained, refuse_folder, refuse_weights, some, source_of
from peftctl.recipe.schema import CLASSIFICATION, ModelSection, QuantizationSection, Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "seq_cls": "AutoModelForSequenceClassification",
    "token_cls": "AutoModelForTokenClassification",
}
STAND_IN_TOKENIZER = "smollm2-135m"
"""Whose tokenizer counts the tokens of rows where the model's own is not to be had."""
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken")


def stand_in(model: ModelSection) -> shapes.Shape | None:
    """Return the shipped shapes of a model that can't be had here; None where it can, or where none are shipped.

    It can't be had where it is neither on this machine nor the hub answers, where its weights were never published,
    and where it would have to run Python code of its own that the section does not allow.
    """
    shape = shapes.find(model.name_or_path)
    if shape is None or Path(model.name_or_path).exists():
        return None
    if not shape.public or (shape.remote_code and not model.trust_remote_code):
        return shape
    try:
        source_of(model)
    except UsageError:
        return shape
    return None


def load_tokenizer(model: ModelSection, *, allow_stand_in: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, padding on the right; without a padding token it pads with its end of text.

    Args:
        model: Whose tokenizer.
        allow_stand_in: Take `STAND_IN_TOKENIZER` where only the model's shapes are known: enough to count tokens.

    Raises:
        UsageError: There is no such model, or it comes without tokenizer files.
    """
    _silence_libraries()
    from transformers import AutoTokenizer

    if allow_stand_in and (shape := stand_in(model)):
        tokenizer = load_tokenizer(ModelSection(name_or_path=STAND_IN_TOKENIZER))
        if not shape.chat_template:  # `template: chat` is refused now, not where the weights are
            tokenizer.chat_template = None
        return tokenizer
    source = source_of(model)
    if source.folder and not source.gguf and not any(any(source.folder.glob(kind)) for kind in _TOKENIZER_FILES):
        raise UsageError(
            f"{source.name}: holds no tokenizer files (tokenizer.json or tokenizer.model); copy them into it"
        )
    with explained(source, "its tokenizer can't be read"):
        tokenizer = AutoTokenizer.from_pretrained(source.place, **source.options)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UsageError(
                f"{source.name}: the tokenizer has neither a padding nor an end-of-text token; give it one"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_model(
    model: ModelSection,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    quantization: QuantizationSection | None = None,
    head: Head | None = None,
) -> PreTrainedModel:
    """Return the model with its weights, in evaluation mode; of a classifier, a head without weights is drawn anew.

    Args:
        model: What to load.
        dtype: Of the weights; None takes the section's.
        device: Where to put it; None leaves it on the CPU.
        attn_implementation: Attention kernel; None takes the section's, else the library's choice.
        quantization: How the weights are stored; None leaves them as they are.
        head: What a classifier's head is made for; None takes what the configuration says.

    Raises:
        UsageError: No such model, or not one that can be loaded as asked.
        ArtifactError: Files are damaged, or lack tensors.
    """
    _silence_libraries()
    import torch

    source = source_of(model)
    refuse_folder(source)
    refuse_weights(source)
    wanted = dtype or model.dtype
    weights = getattr(torch, wanted) if isinstance(wanted, str) else wanted
    quantized = _quantized_options(source, model, quantization, weights, device)
    kernel = attn_implementation or model.attn_implementation
    # The library's progress bar over the tensors of a .gguf file has no switch.
    hushed = redirect_stderr(io.StringIO()) if source.gguf else nullcontext()
    with explained(source, "can't be loaded"), hushed:
        loaded, report = _auto_class(model).from_pretrained(
            source.place,
            dtype=weights,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, with names
            output_loading_info=True,
            **({"attn_implementation": kernel} if kernel else {}),
            **quantized,
            **(head.config() if head else {}),
            **source.options,
        )
    _refuse_gaps(source, model, loaded, report)
    if source.gguf:
        _forget_quantization(loaded)
    if quantized:
        keep_packing(loaded)
        return loaded.eval()
    with explained(source, "can't be moved to its device"):
        return loaded.to(device).eval() if device is not None else loaded.eval()


def meta_model(model: ModelSection, *, allow_stand_in: bool = False, head: Head | None = None) -> PreTrainedModel:
    """Return the model without weights, on the meta device: shapes and names from its configuration alone.

    Args:
        model: What to build.
        allow_stand_in: Take the shapes that peftctl ships where the model can't be had here.
        head: What a classifier's head is made for; None takes what the configuration says.

    Raises:
        UsageError: No such model, or none that can do the section's task.
    """
    _silence_libraries()
    import torch
    from transformers import AutoConfig

    if allow_stand_in and (shape := stand_in(model)):
        name = model.name_or_path
        with explained(Source(name, name, None, {}), f"can't be built as {model.task}"):
            return shape.build(_auto_class(model), getattr(torch, model.dtype), head.config() if head else {})
    source = source_of(model)
    refuse_folder(source)
    with explained(source, "its configuration can't be read"):
        config = AutoConfig.from_pretrained(source.place, **(head.config() if head else {}), **source.options)
    with explained(source, f"can't be built as {model.task}"), torch.device("meta"):
        return _auto_class(model).from_config(
            config, dtype=getattr(torch, model.dtype), trust_remote_code=model.trust_remote_code
        )


def language_task(model: ModelSection) -> Task:
    """Return what a model does by its configuration: continue a text, read one and write another, or name classes.

    Raises:
        UsageError: No such model.
    """
    _silence_libraries()
    from transformers import AutoConfig

    source = source_of(model)
    refuse_folder(source)
    if source.gguf:  # the library reads decoder-only models from these files
        return "causal_lm"
    with explained(source, "its configuration can't be read"):
        config = AutoConfig.from_pretrained(source.place, **source.options)
    classes = (task_of_class(name) for name in config.architectures or ())
    return next((task for task in classes if task), "seq2seq_lm" if config.is_encoder_decoder else "causal_lm")


def _refuse_gaps(source: Source, model: ModelSection, loaded: PreTrainedModel, report: dict[str, Any]) -> None:
    """Raise where tensors of the model were not in the files: the library would leave random numbers there."""
    new = tuple(f"{name}." for name in head_names(loaded))
    missing = {key for key in report["missing_keys"] if not key.startswith(new)}
    if missing:
        raise ArtifactError(
            f"{source.name}: the weight files lack {len(missing)} of the tensors that config.json asks for: "
            f"{some(missing)}; the copy is incomplete or belongs to another configuration"
        )
    wrong = {
        f"{key} is {tuple(found)}, expected {tuple(asked)}"
        for key, found, asked in report["mismatched_keys"]
        if not key.startswith(new)  # a head for other classes
    }
    if wrong:
        raise ArtifactError(f"{source.name}: weights do not fit config.json: {some(wrong)}; one of the two is wrong")
    unread = set(report["unexpected_keys"])
    if unread and model.task not in CLASSIFICATION:  # there the heads of what the backbone was trained for
        warnings.warn(f"{source.name}: {len(unread)} tensors of its files are not used: {some(unread)}", stacklevel=3)


def _quantized_options(
    source: Source,
    model: ModelSection,
    quantization: QuantizationSection | None,
    dtype: torch.dtype,
    device: str | torch.device | None,
) -> dict[str, Any]:
    """Return what a quantised load needs on top; it quantises on the device, tensor by tensor."""
    if quantization is None or quantization.bits is None:
        return {}
    refuse_without_library()
    if source.gguf:
        raise UsageError(
            f"quantization.bits: {source.name} is a .gguf file, which has its own quantisation; give a directory of "
            "safetensors, or remove `quantization:`"
        )
    # The head of a classifier is new and trains.
    keep = head_names(meta_model(model)) if model.task in CLASSIFICATION else ()
    return {"quantization_config": library_config(quantization, dtype, keep), "device_map": {"": device or "cpu"}}


def _forget_quantization(loaded: PreTrainedModel) -> None:
    """Drop the record of a .gguf file's quantisation: its weights are plain ones now, and are saved as such."""
    for record in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(loaded).pop(record, None)
    vars(loaded.config).pop("quantization_config", None)


def _auto_class(model: ModelSection) -> Any:
    import transformers

    return getattr(transformers, AUTO_CLASSES[model.task])


def _silence_libraries() -> None:
    """Keep progress bars over tensors and warnings off the screen; a download still shows its progress."""
    import transformers
    from huggingface_hub.utils import enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    enable_progress_bars()
