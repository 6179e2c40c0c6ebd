"""Several adapters on one base: switched in place, or row by row in one batch (`adapter_names`).

Plain prompts share a model too, row by row by their numbers (`task_ids`): Lester et al. 2021, section 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from peftctl.artifacts.belonging import peft_settings
from peftctl.artifacts.checks import ADAPTER_WEIGHTS, read_keys
from peftctl.artifacts.load import attach, load_base, tokenizer_of
from peftctl.artifacts.locate import Artefact, fetched, locate
from peftctl.errors import ArtifactError, UsageError, did_you_mean
from peftctl.models.fingerprint import weights_fingerprint
from peftctl.tuners.prompts import mixed_prompts

BASE = "base"
"""What turns every adapter off, in `activate`; so no adapter is called that."""
_NO_ADAPTER = "__base__"
"""What peft calls a row without an adapter."""


@dataclass(frozen=True)
class Several:
    """Adapters of one base on one model; the first is active.

    Args:
        model: A PeftModel in eval mode.
        artefacts: The adapters by their names in the model, in the order given.
        tokenizers: What each was trained with; all have the same tokens, templates may differ.
    """

    model: Any
    artefacts: Mapping[str, Artefact]
    tokenizers: Mapping[str, Any]

    @property
    def tokenizer(self) -> Any:
        """The first adapter's tokenizer."""
        return next(iter(self.tokenizers.values()))


def load_several(
    targets: Sequence[str | Path],
    *,
    task: str | None = None,
    dtype: str | None = None,
    device: str | torch.device | None = None,
) -> Several:
    """Load a base once, as the first adapter was trained on it, and put all the adapters on it.

    `model.set_adapter(name)` switches; `adapter_names=[...]` in forward and generate gives each row its own, where
    `__base__` is none. A name is the run's or directory's; where that is taken, more of its path.

    Args:
        targets: At least one run, adapter directory or hub id of an adapter.
        task: Which task of artefacts with several.
        dtype: Of the base's weights; left out, what the first adapter was trained on.
        device: Where to put it; left out, the CPU.

    Raises:
        UsageError: They can't share a model: another base, task, type or vocabulary.
        ArtifactError: Files are damaged, or the base is another.
    """
    if not targets:
        raise UsageError("expected at least one adapter, got none")
    if task is not None:
        raise UsageError(f"{targets[0]}: has no task '{task}'")
    found = [fetched(locate(target)) for target in targets]
    types = [_shareable_type(artefact) for artefact in found]
    for artefact, kind in zip(found[1:], types[1:], strict=True):
        _refuse_unlike(found[0], types[0], artefact, kind)
    artefacts = dict(zip(adapter_names(found), found, strict=True))
    tokenizers = {name: tokenizer_of(artefact) for name, artefact in artefacts.items()}
    _refuse_other_tokens(artefacts, tokenizers)
    model = load_base(found[0], dtype=dtype, device=device)
    _refuse_other_weights(found, model)
    for name, artefact in artefacts.items():
        model = attach(model, artefact, name)
    model.set_adapter(next(iter(artefacts)), inference_mode=True)
    _guard_rows(model)
    return Several(model, artefacts, tokenizers)


def are_prompts(targets: Sequence[str | Path]) -> bool:
    """Whether these are several prompts, as prompt tuning and P-tuning leave them, and nothing else."""
    found = [fetched(locate(target)) for target in targets]
    return bool(found) and all(
        artefact.is_adapter and artefact.has_weights and peft_settings(artefact).peft_type == "PROMPT_TUNING"
        for artefact in found
    )


def load_prompts(
    targets: Sequence[str | Path], *, dtype: str | None = None, device: str | torch.device | None = None
) -> Several:
    """Load a base once, with the prompts of several runs: different tasks then share a batch.

    `task_ids`, (batch,), in forward and generate say which prompt each row reads: its number in `targets`, from 0.
    Rows without one read the last. In generate, rows of a batch must be of one length: peft counts the positions of a
    decoder from the prompt on, also through the padding behind it.

    Args:
        targets: Runs, adapter directories or hub ids; of a run with several tasks, the directories of its tasks.
        dtype: Of the base's weights; left out, what the first prompt was trained on.
        device: Where to put it; left out, the CPU.

    Raises:
        UsageError: They can't share a model: another base, task, vocabulary, or length of the prompt.
        ArtifactError: Files are damaged, or the base is another.
    """
    found = [fetched(locate(target)) for target in targets]
    prompts = [_prompt(artefact) for artefact in found]
    for artefact, prompt in zip(found[1:], prompts[1:], strict=True):
        _refuse_unlike(found[0], "PROMPT_TUNING", artefact, "PROMPT_TUNING")
        if prompt.shape != prompts[0].shape:
            raise UsageError(
                f"{artefact.target}: is a prompt of {len(prompt)} vectors, {found[0].target} has {len(prompts[0])}; "
                "only prompts of one length can share a batch"
            )
    artefacts = {str(i): artefact for i, artefact in enumerate(found)}
    tokenizers = {name: tokenizer_of(artefact) for name, artefact in artefacts.items()}
    _refuse_other_tokens(artefacts, tokenizers)
    base = load_base(found[0], dtype=dtype, device=device)
    _refuse_other_weights(found, base)
    return Several(mixed_prompts(base, peft_settings(found[0]), torch.stack(prompts)), artefacts, tokenizers)


def _prompt(artefact: Artefact) -> torch.Tensor:
    """Return the vectors of a prompt, (n, d); of an encoder-decoder those that its encoder reads."""
    file = Path(str(artefact.folder)) / ADAPTER_WEIGHTS
    read_keys(file)  # names what is damaged
    tensors = load_file(file)
    if "prompt_embeddings" not in tensors:
        raise ArtifactError(f"{file}: holds no prompt_embeddings; train the prompt again")
    return tensors["prompt_embeddings"][: peft_settings(artefact).num_virtual_tokens].float()


def activate(model: Any, name: str) -> None:
    """Let an adapter of the model answer, or none with `base`; nothing is loaded.

    Args:
        model: What `load_several` made.
        name: Of an adapter, or `base`.
    """
    if name == BASE:
        model.base_model.disable_adapter_layers()
        return
    model.base_model.enable_adapter_layers()
    model.set_adapter(name, inference_mode=True)


def adapter_names(artefacts: Sequence[Artefact]) -> list[str]:
    """Return a name for each adapter: the shortest end of its path that no other shares and that torch and peft take.

    peft tells tensors of other adapters by `.name.` anywhere in their keys, so parts of keys are no names.

    Raises:
        UsageError: The same adapter is given twice.
    """
    ends = [list(_ends(artefact)) for artefact in artefacts]
    for i, artefact in enumerate(artefacts):
        if ends[i][-1] in [other[-1] for other in ends[:i]]:
            raise UsageError(f"{artefact.target}: is given twice")
    reserved = {BASE, _NO_ADAPTER}
    for artefact in artefacts:
        keys = read_keys(Path(str(artefact.folder)) / ADAPTER_WEIGHTS)
        reserved |= {part for key in keys for part in key.split(".")}
    names = []
    for i, own in enumerate(ends):
        others = {end for j, other in enumerate(ends) if j != i for end in other} | reserved
        names.append(next(end for end in own if end not in others and not hasattr(torch.nn.ModuleDict(), end)))
    return names


def _ends(artefact: Artefact) -> Iterator[str]:
    """Yield `c`, `b/c`, `a/b/c` of /a/b/c; torch takes no full stop in a module's name."""
    path = Path(artefact.target) if artefact.path is None else artefact.path.absolute()
    parts = [part.replace(".", "_") for part in path.parts if part != "/"]
    parts = parts[:-1] if parts[-1] == "adapter" and len(parts) > 1 else parts
    for first in range(len(parts) - 1, -1, -1):
        yield "/".join(parts[first:])
    yield "/" + "/".join(parts)


def _shareable_type(artefact: Artefact) -> str:
    """Return the peft type of an adapter.

    Raises:
        UsageError: It is no adapter, or of a kind that can't stand beside others.
    """
    if not artefact.is_adapter:
        raise UsageError(f"{artefact.target}: is a whole model; only adapters of one base can be loaded together")
    if not artefact.has_weights:
        raise UsageError(
            f"{artefact.target}: holds a template and no weights, so there is nothing to switch; load it alone"
        )
    config = peft_settings(artefact)
    kind = str(getattr(config.peft_type, "value", config.peft_type))  # our own types are plain strings
    if config.is_prompt_learning:
        raise UsageError(f"{artefact.target}: {kind} is a prompt, which can't share a model with other adapters")
    if getattr(config, "bias", "none") != "none":  # a key of some peft types only
        raise UsageError(
            f"{artefact.target}: trains biases of the base itself, which other adapters would see; load it alone"
        )
    return kind


def _refuse_unlike(first: Artefact, first_kind: str, other: Artefact, kind: str) -> None:
    if kind != first_kind:
        raise UsageError(
            f"{other.target}: is {kind}, {first.target} is {first_kind}; adapters on one base must be of one type"
        )
    ours, theirs = first.manifest, other.manifest
    for key, what in (("task", "task"), ("config_changes", "change of the base's configuration")):
        if ours and theirs and ours.get(key) != theirs.get(key):
            raise UsageError(
                f"{other.target}: its {what} ({theirs.get(key)}) is not that of {first.target} ({ours.get(key)})"
            )
    expected, found = (m.get("base", {}).get("fingerprint") for m in (ours, theirs))
    if None not in (expected, found) and found != expected:
        raise UsageError(
            f"{other.target}: is an adapter of another base: {other.base} with fingerprint {found[:12]}, "
            f"{first.target} of {first.base} with {expected[:12]}"
        )


def _refuse_other_weights(artefacts: Sequence[Artefact], model: Any) -> None:
    """Raise where the first adapter has no record of its base, and the base is not that of the others."""
    if artefacts[0].manifest.get("base", {}).get("fingerprint") is not None:
        return
    found = weights_fingerprint(model)
    for artefact in artefacts[1:]:
        expected = artefact.manifest.get("base", {}).get("fingerprint")
        if expected not in (None, found) or (expected is None and artefact.base != artefacts[0].base):
            raise UsageError(
                f"{artefact.target}: is an adapter of another base: {artefact.base}, not {artefacts[0].base}"
            )


def _refuse_other_tokens(artefacts: Mapping[str, Artefact], tokenizers: Mapping[str, Any]) -> None:
    first, *others = tokenizers
    for name in others:
        if tokenizers[name].get_vocab() != tokenizers[first].get_vocab():
            raise UsageError(
                f"{artefacts[name].target}: its tokenizer has other tokens than that of {artefacts[first].target}; "
                "load them one at a time"
            )


def _guard_rows(model: Any) -> None:
    """Make `adapter_names` an error where peft would pass over it in silence, or mix rows up.

    Tuners without support drop the argument; copies of whole modules follow the active adapter.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper

    tuner = model.base_model
    supported = getattr(type(tuner), "_enable_peft_forward_hooks", None)
    whole = any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())
    names = list(model.peft_config)

    def hooks(*args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        wanted = kwargs.get("adapter_names")
        if wanted is None:
            return supported(tuner, *args, **kwargs) if supported else nullcontext()
        if supported is None or whole:
            what = "adapters with whole modules (modules_to_save, new tokens)" if whole else "adapters of this type"
            raise UsageError(f"adapter_names: {what} can't share a batch; switch with model.set_adapter(name)")
        for name in wanted:
            if name not in names and name != _NO_ADAPTER:
                raise UsageError(f"adapter_names: no adapter '{name}'; {did_you_mean(name, [*names, _NO_ADAPTER])}")
        return supported(tuner, *args, **kwargs)

    tuner._enable_peft_forward_hooks = hooks
