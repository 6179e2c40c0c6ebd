"""Load base models and tokenizers: hub ids, directories, .gguf files and aliases; every failure is one line."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftctl.errors import ArtifactError, RunError, UsageError
from peftctl.models.aliases import ALIASES, resolve
from peftctl.recipe.schema import ModelSection, QuantizationSection

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "seq_cls": "AutoModelForSequenceClassification",
    "token_cls": "AutoModelForTokenClassification",
}
_NEW_HEADS = ("seq_cls", "token_cls")
"""Tasks whose head a pretrained checkpoint does not hold."""
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken")


@dataclass(frozen=True)
class _Source:
    """Where a model comes from.

    Args:
        name: As the user wrote it, for messages.
        place: What the library loads: a directory or a hub id.
        folder: `place` as a path, None for a hub id.
        options: Keyword arguments of every `from_pretrained`.
    """

    name: str
    place: str
    folder: Path | None
    options: dict[str, Any]

    @property
    def gguf(self) -> bool:
        """Whether it is a .gguf file in `folder`."""
        return "gguf_file" in self.options


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, padding on the right; without a padding token it pads with its end of text.

    Raises:
        UsageError: There is no such model, or it comes without tokenizer files.
    """
    _silence_libraries()
    from transformers import AutoTokenizer

    source = _source(model)
    if source.folder and not source.gguf and not any(any(source.folder.glob(kind)) for kind in _TOKENIZER_FILES):
        raise UsageError(
            f"{source.name}: holds no tokenizer files (tokenizer.json or tokenizer.model); copy them into it"
        )
    with _explained(source, "its tokenizer can't be read"):
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
) -> PreTrainedModel:
    """Return the model with its weights, in evaluation mode.

    Args:
        model: What to load.
        dtype: Of the weights; None takes the section's.
        device: Where to put it; None leaves it on the CPU.
        attn_implementation: Attention kernel; None takes the section's, else the library's choice.
        quantization: How the weights are stored; None leaves them as they are.

    Raises:
        UsageError: No such model, or not one that can be loaded as asked.
        ArtifactError: Files are damaged, or lack tensors.
    """
    _silence_libraries()
    import torch

    source = _source(model)
    _refuse_folder(source)
    _refuse_weights(source)
    wanted = dtype or model.dtype
    kernel = attn_implementation or model.attn_implementation
    # The library's progress bar over the tensors of a .gguf file has no switch.
    hushed = redirect_stderr(io.StringIO()) if source.gguf else nullcontext()
    with _explained(source, "can't be loaded"), hushed:
        loaded, report = _auto_class(model).from_pretrained(
            source.place,
            dtype=getattr(torch, wanted) if isinstance(wanted, str) else wanted,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, with names
            output_loading_info=True,
            **({"attn_implementation": kernel} if kernel else {}),
            **source.options,
        )
    _refuse_gaps(source, model, loaded, report)
    if source.gguf:
        _forget_quantization(loaded)
    try:
        return loaded.to(device).eval() if device is not None else loaded.eval()
    except torch.OutOfMemoryError as error:
        raise RunError(f"{source.name}: its weights do not fit on {device}; take a smaller model or dtype") from error


def meta_model(model: ModelSection) -> PreTrainedModel:
    """Return the model without weights, on the meta device: shapes and names from its configuration alone.

    Raises:
        UsageError: No such model, or none that can do the section's task.
    """
    _silence_libraries()
    import torch
    from transformers import AutoConfig

    source = _source(model)
    _refuse_folder(source)
    with _explained(source, "its configuration can't be read"):
        config = AutoConfig.from_pretrained(source.place, **source.options)
    with _explained(source, f"can't be built as {model.task}"), torch.device("meta"):
        return _auto_class(model).from_config(
            config, dtype=getattr(torch, model.dtype), trust_remote_code=model.trust_remote_code
        )


def _source(model: ModelSection) -> _Source:
    """Find the model.

    Raises:
        UsageError: It looks like a path, and nothing is there.
    """
    name = model.name_or_path
    path = Path(resolve(name)).expanduser()
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"{name}: no such file")
        return _Source(name, str(path.parent), path.parent, options | {"gguf_file": path.name})
    if path.is_dir():
        return _Source(name, str(path), path, options)
    if path.is_file():
        raise UsageError(f"{name}: is a file; expected a model directory, a .gguf file or a hub id")
    place = resolve(name)
    if place.startswith(("/", ".", "~")) or place.count("/") > 1:
        raise UsageError(f"{name}: no such directory; expected a model directory, a .gguf file or a hub id")
    revision = model.revision or "main"
    if hub_answers():
        return _Source(name, place, None, options | {"revision": revision})
    folder = _downloaded(name, place, revision)
    return _Source(name, str(folder), folder, options)


def _downloaded(name: str, hub_id: str, revision: str) -> Path:
    """Return the copy that an earlier download left on this machine."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:  # ValueError: not a name that a hub id can have
        fetched = "fetch it with: python scripts/fetch_demo_models.py"
        hint = fetched if name in ALIASES else f"give a local directory, or a demo model ({' or '.join(ALIASES)})"
        raise UsageError(f"{name}: not on this machine, and the model hub can't be reached; {hint}") from error


@cache
def hub_answers() -> bool:
    """Tell at once whether the hub can be reached; the library's own retries take most of a minute a file."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the reason is, only files on this machine can be loaded
        return False
    return True


def _refuse_folder(source: _Source) -> None:
    """Raise a UsageError where a directory is not a model's."""
    folder = source.folder
    if folder is None or source.gguf or (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        hint = "it is an adapter; give its base model, or merge it first: peftctl merge"
    elif (folder / "adapter").is_dir() or (folder / "model").is_dir():
        hint = "it is a run directory; give its model/, or merge it first: peftctl merge"
    else:
        hint = "expected a directory with config.json, *.safetensors and tokenizer files"
    raise UsageError(f"{source.name}: holds no config.json; {hint}")


def _refuse_weights(source: _Source) -> None:
    """Raise where the weight files of a directory are missing, of an unsafe kind or damaged."""
    if source.folder is None or source.gguf:
        return
    from safetensors import SafetensorError, safe_open

    files = sorted(source.folder.glob("*.safetensors"))
    if not files:
        pickled = any(source.folder.glob("*.bin")) or any(source.folder.glob("*.pt"))
        hint = (
            "pickle files can run code and are not loaded, convert them" if pickled else "copy or download the weights"
        )
        raise UsageError(f"{source.name}: holds no *.safetensors file; {hint}")
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{file}: damaged or cut short ({error}); copy or download it again") from error
    index = source.folder / "model.safetensors.index.json"
    with _explained(source, f"{index.name} can't be read"):
        listed = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else set()
    missing = sorted(listed - {file.name for file in files})
    if missing:
        raise ArtifactError(f"{source.name}: lacks {_some(missing)}, listed in {index.name}; copy or download it again")


def _refuse_gaps(source: _Source, model: ModelSection, loaded: PreTrainedModel, report: dict[str, Any]) -> None:
    """Raise where tensors of the model were not in the files: the library would leave random numbers there."""
    missing = set(report["missing_keys"])
    if model.task in _NEW_HEADS:
        missing = {key for key in missing if key.startswith(loaded.base_model_prefix + ".")}
    if missing:
        raise ArtifactError(
            f"{source.name}: the weight files lack {len(missing)} of the tensors that config.json asks for: "
            f"{_some(missing)}; the copy is incomplete or belongs to another configuration"
        )
    wrong = {f"{key} is {tuple(found)}, expected {tuple(asked)}" for key, found, asked in report["mismatched_keys"]}
    if wrong:
        raise ArtifactError(f"{source.name}: weights do not fit config.json: {_some(wrong)}; one of the two is wrong")
    unread = set(report["unexpected_keys"])
    if unread:
        warnings.warn(f"{source.name}: {len(unread)} tensors of its files are not used: {_some(unread)}", stacklevel=3)


def _forget_quantization(loaded: PreTrainedModel) -> None:
    """Drop the record of a .gguf file's quantisation: its weights are plain ones now, and are saved as such."""
    for record in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(loaded).pop(record, None)
    vars(loaded.config).pop("quantization_config", None)


@contextmanager
def _explained(source: _Source, failure: str) -> Iterator[None]:
    """Turn whatever the libraries raise into one line; the cause stays attached for PEFTCTL_DEBUG."""
    try:
        yield
    except Exception as error:
        raise _explain(source, failure, error) from error


def _explain(source: _Source, failure: str, error: Exception) -> ArtifactError | UsageError:
    text = str(error)
    first = (text.strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
    if "trust_remote_code" in text:
        return UsageError(
            f"{source.name}: comes with its own Python code; read it, then set model.trust_remote_code=true"
        )
    if "flash_attn" in text or "FlashAttention" in text:
        return UsageError(f"model.attn_implementation: {first}; leave it out, or take sdpa")
    if source.folder is None and "safetensors" in text:
        return UsageError(f"{source.name}: the hub has no safetensors weights of it; pickle files are not loaded")
    if source.folder is None and isinstance(error, OSError):
        return UsageError(f"{source.name}: {first}; check the name, model.revision and your access to it")
    if "for this kind of AutoModel" in text or "does not recognize this architecture" in text:
        return UsageError(f"{source.name}: {failure}: {first}; take another model, or update transformers")
    return ArtifactError(f"{source.name}: {failure}: {first}; the files may be damaged: copy or download them again")


def _some(names: Collection[str]) -> str:
    """Return the first three names."""
    shown = sorted(names)[:3]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


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
