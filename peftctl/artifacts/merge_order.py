"""Several adapters into one base, in order: each is merged into the result of the one before.

    W_0 = W,   W_i = W_(i-1) + s_i B_i A_i

All but the last result are kept in float32, so the weights are rounded once, and the last gate compares what was
written with the exact W_(n-1) plus the last adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftctl.artifacts import manifest as manifests
from peftctl.artifacts.belonging import adapter_digest, label
from peftctl.artifacts.dtypes import stored_dtype
from peftctl.artifacts.load import base_section
from peftctl.artifacts.locate import Artefact
from peftctl.artifacts.merge import MergeResult, merge
from peftctl.artifacts.model_card import render_merged_card
from peftctl.artifacts.rundir import staged
from peftctl.artifacts.staging import remove
from peftctl.recipe.schema import ModelSection


def merge_in_order(
    artefacts: Sequence[Artefact],
    output: Path,
    *,
    base: ModelSection | None = None,
    dtype: str | None = None,
    rows: Sequence[Sequence[int]] | None = None,
) -> list[MergeResult]:
    """Merge adapters of one base into it and write a whole model, whose peftctl.json records each of them.

    Args:
        artefacts: The adapters, at least one; the caller has checked that they belong to the base.
        output: Model directory to write; must not exist, or be empty.
        base: Where the base lies; left out, where the first adapter says.
        dtype: To store the weights in; left out, the base's stored type.
        rows: Token ids of held-out rows for the gates; left out, fixed sentences.

    Returns:
        The figures of each merge.

    Raises:
        UsageError: There is nothing to merge, a method can't be merged, or `output` is taken.
        ArtifactError: A merged model does not answer like the unmerged; `output` is not written.
        RunError: The disk is full.
    """
    section = base or base_section(artefacts[0])
    kind = dtype or stored_dtype(section)
    results: list[MergeResult] = []
    with staged(output) as aside:
        steps = [aside / f"step-{i}" for i in range(len(artefacts))]  # inside, so that they go with it
        aside.mkdir()
        for i, (artefact, step) in enumerate(zip(artefacts, steps, strict=True)):
            on_base = _on(artefact, section) if i == 0 else _on_step(artefact, steps[i - 1])
            last = i == len(artefacts) - 1
            result = merge(on_base, step, dtype=kind if last else "float32", rows=rows)
            results.append(replace(result, output=str(output)))
            if i > 0:
                remove(steps[i - 1])
        for entry in list(steps[-1].iterdir()):
            entry.rename(aside / entry.name)
        steps[-1].rmdir()
        _describe(aside, artefacts, section, results)
    return results


def _on(artefact: Artefact, section: ModelSection) -> Artefact:
    """Return the adapter with its base where the section says; merging checks its fingerprint."""
    place = {"name": section.name_or_path, "revision": section.revision}
    return replace(artefact, base=section.name_or_path, manifest=_with_base(artefact, place))


def _on_step(artefact: Artefact, step: Path) -> Artefact:
    """Return the adapter as one of a base that has other adapters merged in, whose weights no record knows."""
    place = {"name": str(step), "revision": None, "fingerprint": None, "dtype": "float32", "quantization": None}
    return replace(artefact, base=str(step), manifest=_with_base(artefact, place))


def _with_base(artefact: Artefact, changes: Mapping[str, Any]) -> Mapping[str, Any]:
    if not artefact.manifest:  # of another tool
        return {}
    return {**artefact.manifest, "base": {**artefact.manifest["base"], **changes}}


def _describe(
    folder: Path, artefacts: Sequence[Artefact], section: ModelSection, results: Sequence[MergeResult]
) -> None:
    """Let peftctl.json and the model card name the base that was there first, and every adapter."""
    record = manifests.read(folder)
    first = artefacts[0].manifest.get("base", {})
    record["base"] = {
        "name": manifests.portable_name(section.name_or_path),
        "revision": section.revision,
        "fingerprint": first.get("fingerprint"),
        "dtype": first.get("dtype", section.dtype),
    }
    record["adapters"] = [
        {"name": label(a), "method": a.manifest.get("method", "peft"), "sha256": adapter_digest(a)} for a in artefacts
    ]
    manifests.write(folder, record)
    figures: dict[str, Any] = {
        "adapters, in order": ", ".join(entry["name"] for entry in record["adapters"]),
        "dtype": results[-1].dtype,
        "layers": sum(result.layers for result in results),
        "max_delta": results[-1].max_delta,
        "kl": results[-1].kl,
        "top1_agreement": results[-1].top1_agreement,
        "positions": results[-1].positions,
    }
    methods = " and ".join(dict.fromkeys(entry["method"] for entry in record["adapters"]))
    names = " and ".join(entry["name"] for entry in record["adapters"])
    card = render_merged_card(section.name_or_path, methods, names, section.task, figures)
    (folder / "README.md").write_text(card, encoding="utf-8")
