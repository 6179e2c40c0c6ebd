"""Fold an adapter into its base: W <- W + s B A, computed in float32 and rounded once; gated by parity.py."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from peftctl.artifacts import manifest as manifests
from peftctl.artifacts import parity
from peftctl.artifacts.checks import check_weights, probe_logits
from peftctl.artifacts.dtypes import stored_dtype
from peftctl.artifacts.fold import Loss, fold, round_weights
from peftctl.artifacts.load import attach, base_section, load_base, quantization_of, tokenizer_of
from peftctl.artifacts.locate import Artefact, fetched, locate
from peftctl.artifacts.model_card import render_merged_card
from peftctl.artifacts.rundir import staged
from peftctl.artifacts.save import MAX_SHARD
from peftctl.errors import UsageError
from peftctl.methods import registry
from peftctl.models.load import load_model
from peftctl.recipe.schema import DType, ModelSection

_DTYPES = DType.__args__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class MergeResult:
    """What a merge did and what it cost.

    Args:
        output: The model directory.
        dtype: What its weights are stored in.
        layers: Layers that an adapter was folded into.
        max_delta: Largest difference of a logit between base plus adapter and the merged model read back, in float32.
        kl: Mean KL(unmerged || merged), nats.
        top1_agreement: Share of positions with the same most likely token.
        positions: Positions compared.
        folding_error: Relative RMS difference of logits by folding alone, before rounding to `dtype`.
        lost: Share of the update that rounding to `dtype` lost: |(merged - W) - BA| / |BA|, Frobenius, all layers.
        cosine: Between merged - W and BA, all layers.
        drift: Where training saw a quantised base: how the merged model differs from that base plus the adapter, which
            is reported and not gated: `max_delta`, `kl`, `top1_agreement`. The update goes into the original weights.
    """

    output: str
    dtype: str
    layers: int
    max_delta: float
    kl: float
    top1_agreement: float
    positions: int
    folding_error: float
    lost: float
    cosine: float
    drift: dict[str, float] | None = None


def merge(
    target: str | Path | Artefact,
    output: str | Path,
    *,
    dtype: str | None = None,
    base: str | None = None,
    rows: Sequence[Sequence[int]] | None = None,
    max_shard_size: str = MAX_SHARD,
) -> MergeResult:
    """Merge an adapter into its base and write a whole model.

    Args:
        target: Run or adapter directory, the hub id of an adapter, or what `locate` returned.
        output: Model directory to write; must not exist, or be empty.
        dtype: To store the weights in; left out, the base's stored type.
        base: Where the base lies; left out, where the adapter says.
        rows: Token ids of held-out rows for the gate; left out, fixed sentences.
        max_shard_size: Largest file.

    Raises:
        UsageError: There is nothing to merge, the method can't be merged, or `output` is taken.
        ArtifactError: The base is another one, or the merged model does not answer like the unmerged; `output` is
            not written.
        RunError: The disk is full.
    """
    artefact = target if isinstance(target, Artefact) else fetched(locate(target))
    place = Path(output).expanduser()
    _refuse(artefact, place, dtype)
    section = base_section(artefact)
    if base is not None:
        section = section.model_copy(update={"name_or_path": base, "revision": None})
    kind = dtype or stored_dtype(section)
    tokenizer = tokenizer_of(artefact)
    probes = parity.probe_rows(tokenizer, rows)

    model = attach(load_base(artefact, dtype="float32", base=base, quantized=False), artefact)
    reference = probe_logits(model, probes)
    model, loss = fold(model, getattr(torch, kind))
    folded = parity.compare(reference, probe_logits(model, probes))
    parity.require_exact(folded, "folding the adapter into the weights changed the answers")
    round_weights(model, getattr(torch, kind))
    rounded = probe_logits(model, probes)
    with staged(place) as folder:
        folder.mkdir()
        model.to(getattr(torch, kind)).save_pretrained(folder, max_shard_size=max_shard_size)
        del model
        gc.collect()
        tokenizer.save_pretrained(folder)
        check_weights(folder)
        merged = _read_back(folder, section, probes)
        parity.require_exact(parity.compare(rounded, merged), "reading it back from disk changed the answers")
        final = parity.compare(reference, merged)
        parity.require_close(final, kind)
        result = replace(_result(place, kind, folded, final, loss), drift=_drift(artefact, base, probes, merged))
        _describe(folder, artefact, section, result)
    return result


def _drift(
    artefact: Artefact, base: str | None, probes: list[list[int]], merged: torch.Tensor
) -> dict[str, float] | None:
    """Compare the merged model with what was trained, base in 4 or 8 bits; None where that is the same base."""
    if quantization_of(artefact) is None:
        return None
    trained = attach(load_base(artefact, base=base), artefact)
    moved = parity.compare(probe_logits(trained, probes), merged)
    return {"max_delta": moved.max_delta, "kl": moved.kl, "top1_agreement": moved.top1_agreement}


def _refuse(artefact: Artefact, output: Path, dtype: str | None) -> None:
    if not artefact.is_adapter:
        where = artefact.folder or artefact.target
        raise UsageError(f"{artefact.target}: nothing to merge: it is already a whole model at {where}")
    if artefact.manifest and artefact.manifest["method"] in registry.names():
        card = registry.get(artefact.manifest["method"]).card
        if not card.mergeable:
            raise UsageError(f"{artefact.target}: {card.title} can't be merged: {card.merge_note}")
    if not artefact.has_weights:
        raise UsageError(f"{artefact.target}: nothing to merge: it holds a tokenizer and no weights")
    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(f"--dtype: expected {', '.join(_DTYPES)}, got '{dtype}'")
    if os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"--output: {output} exists already; choose another")
    existing = next(p for p in output.absolute().parents if p.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"--output: {output} can't be written: no write access to {existing}")


def _read_back(folder: Path, section: ModelSection, probes: list[list[int]]) -> torch.Tensor:
    written = section.model_copy(update={"name_or_path": str(folder), "revision": None})
    return probe_logits(load_model(written, dtype="float32"), probes)


def _result(output: Path, dtype: str, folded: parity.Parity, final: parity.Parity, loss: Loss) -> MergeResult:
    return MergeResult(
        output=str(output),
        dtype=dtype,
        layers=loss.layers,
        max_delta=final.max_delta,
        kl=final.kl,
        top1_agreement=final.top1_agreement,
        positions=final.positions,
        folding_error=folded.relative,
        lost=loss.relative,
        cosine=loss.cosine,
    )


def _describe(folder: Path, artefact: Artefact, section: ModelSection, result: MergeResult) -> None:
    """Write peftctl.json and the model card."""
    figures = {name: value for name, value in asdict(result).items() if name not in ("output", "drift")}
    method = artefact.manifest.get("method", "peft")
    record = {
        "format": manifests.FORMAT,
        "method": method,
        "base": {**artefact.manifest.get("base", {}), "name": manifests.portable_name(section.name_or_path)},
        "task": section.task,
        "template": artefact.manifest.get("template", "chat"),
        "config_changes": {},
        "tasks": [],
        "merged": {"adapter": str(artefact.folder), **figures, "drift": result.drift},
    }
    manifests.write(folder, record)
    figures |= {f"drift_{name}": value for name, value in (result.drift or {}).items()}
    card = render_merged_card(section.name_or_path, method, str(artefact.folder), section.task, figures)
    (folder / "README.md").write_text(card, encoding="utf-8")
