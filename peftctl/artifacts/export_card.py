"""README.md of an exported folder: what the artefact's own record and the files of its run say, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import try_to_load_from_cache

from peftctl.artifacts.locate import ADAPTER_CONFIG, Artefact
from peftctl.artifacts.manifest import NAME, read_json
from peftctl.artifacts.model_card import (
    base_lines,
    code,
    figure,
    front_matter,
    is_known,
    merged_before,
    public_name,
    shown_use,
    table,
    type_lines,
    whole_lines,
)
from peftctl.methods import registry
from peftctl.models.aliases import resolve

if TYPE_CHECKING:
    from peftctl.methods.base import Card

# Key of summary.json -> how the card calls it.
_FIGURES = {
    "trainable_parameters": "trainable parameters",
    "total_parameters": "total parameters",
    "steps": "optimizer steps",
    "train_tokens": "tokens seen",
    "supervised_tokens": "of them trained on",
    "train_seconds": "seconds",
    "train_loss": "training loss",
}
_PARITY = ("max_delta", "kl", "top1_agreement", "positions", "lost")
GIB = 2**30


def render(artefact: Artefact, folder: Path, *, merged: bool, name: str = "DIRECTORY") -> str:
    """Return the model card of an exported folder that peftctl made.

    Args:
        artefact: What was exported, with a record of its own.
        folder: The exported files.
        merged: Whether the adapter was merged into its base on the way.
        name: What loads it: a directory, or the repository that it is pushed to.
    """
    method = artefact.manifest["method"]
    card = registry.get(method).card if method in registry.names() else None
    base = public_name(artefact.base) if artefact.base else folder.name
    title = card.title if card else method
    licence = base_licence(artefact.base)
    library = "peft" if artefact.is_adapter and artefact.has_weights and not merged else "transformers"
    head = front_matter(base, method, library=library, license=licence[0] if licence else None)
    parts = [head, f"# {base}, fine-tuned with {title}\n", *([f"{card.summary}\n"] if card else [])]
    parts += [table(_facts(artefact, base, card, licence))]
    parts += _metrics(artefact)
    parts += _merged(read_json(folder / NAME)["merged"]) if merged else []
    parts += ["## Good to know\n", "\n".join(f"- {line}" for line in _special(artefact, merged)) + "\n"]
    parts += ["## How to load it\n", _snippet(artefact, merged=merged, name=name)]
    parts += [f"With peftctl: `{shown_use(name, artefact.manifest['task'])}`.\n"]
    return "\n".join(parts)


def base_licence(base: str | None) -> tuple[str | None, str] | None:
    """Return (identifier or None, line for readers) of the licence that lies with a base; None where none does."""
    card = None if base is None else _file_of(base, "README.md")
    if card is not None:
        head = card.read_text(encoding="utf-8", errors="replace").split("---")
        fields = _mapping(head[1]) if len(head) > 2 and not head[0].strip() else {}
        if isinstance(fields.get("license"), str):
            return fields["license"], str(fields["license"])
    text = None if base is None else _file_of(base, "LICENSE")
    if text is None:
        return None
    lines = [line.strip() for line in text.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return (None, " ".join(lines[:2])) if lines else None


def _facts(artefact: Artefact, base: str, card: Card | None, licence: tuple[str | None, str] | None) -> dict[str, str]:
    rows = {"method": f"{card.title} ({card.paper})", "trains": card.trains} if card else {}
    rows |= {"base model": f"`{base}`", **(merged_before(artefact.base) if artefact.base else {})}
    record = artefact.manifest["base"]
    values: dict[str, Any] = {"base weights (fingerprint)": record.get("fingerprint")}
    values["licence of the base"] = licence[1] if licence else None
    summary, environment = _of_run(artefact, "summary.json"), _of_run(artefact, "environment.json")
    values["data (fingerprint)"] = environment.get("data_fingerprint")
    values |= {label: summary.get(key) for key, label in _FIGURES.items()}
    memory = summary.get("peak_memory_bytes")
    values["peak memory"] = f"{memory / GIB:.2f} GiB" if memory else None
    return rows | {label: figure(value) for label, value in values.items() if is_known(value)}


def _metrics(artefact: Artefact) -> list[str]:
    """Return a table of the held-out metrics before and after, and of benchmark tasks, where there are any."""
    measured = _of_run(artefact, "summary.json").get("eval", {})
    before, after = measured.get("before", {}), measured.get("after", {})
    parts = []
    if after:
        rows = [f"| {name} | {figure(before.get(name, ''))} | {figure(value)} |" for name, value in after.items()]
        parts += ["## Held-out rows\n", "\n".join(["| metric | before | after |", "|---|---|---|", *rows, ""])]
    tasks = _of_run(artefact, "eval.json").get("tasks", {})
    lines = [f"| {task} | {name} | {figure(value)} |" for task, found in tasks.items() for name, value in found.items()]
    if lines:
        parts += ["## Benchmarks\n", "\n".join(["| task | metric | value |", "|---|---|---|", *lines, ""])]
    return parts


def _merged(parity: Mapping[str, Any]) -> list[str]:
    rows = {name.replace("_", " "): figure(parity[name]) for name in _PARITY}
    return ["## Merged\n", "The adapter is folded into the weights. Compared with the unmerged model:\n", table(rows)]


def _special(artefact: Artefact, merged: bool) -> list[str]:
    """Return what a user of the result must know."""
    bits = (artefact.manifest["base"].get("quantization") or {}).get("bits")
    changed = artefact.manifest.get("config_changes", {})
    rows, rope = changed.get("vocab_size"), changed.get("rope_parameters")
    template = artefact.manifest.get("template", "chat")
    lines = []
    if bits:
        lines += [f"Trained over a base quantised to {bits} bits; on the original weights answers differ slightly."]
    if rows and not merged:
        lines += [f"It has new tokens: the base must be resized to {rows:,} rows before the adapter is attached."]
    if rows and merged:
        lines += [f"It has new tokens: {rows:,} rows of embeddings."]
    if rope:
        where = "config.json here says so" if merged else "the base must be loaded with these positions, see below"
        lines += [f"Positions are divided by {rope['factor']:g} (linear RoPE): {where}."]
    if template == "chat":
        lines += ["Conversations are written by the chat template that comes with the tokenizer here."]
    else:
        lines += [f"Trained on single requests in the template `{json.dumps(template)}`, not on conversations."]
    return lines


def _snippet(artefact: Artefact, *, merged: bool, name: str) -> str:
    """Return Python that loads the folder with the libraries alone."""
    task = artefact.manifest["task"]
    if merged or not artefact.is_adapter:
        return code(whole_lines(name, task))
    assert artefact.base is not None and artefact.folder is not None  # an adapter of peftctl's has both
    published = name != "DIRECTORY"
    place = public_name(artefact.base) if published else resolve(artefact.base)
    changed = artefact.manifest.get("config_changes", {})
    dtype, rope = artefact.manifest["base"]["dtype"], changed.get("rope_parameters")
    lines = base_lines(place, task, dtype, artefact.manifest.get("head"), rope)
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{name}")'
    if not artefact.has_weights:
        return code([*lines, tokenizer])
    if rows := changed.get("vocab_size"):
        lines += [f"base.resize_token_embeddings({rows})  # rows of the added tokens"]
    first = type_lines(read_json(artefact.folder / ADAPTER_CONFIG)["peft_type"])
    attached = f'model = PeftModel.from_pretrained(base, "{name}")'
    return code([*first, "from peft import PeftModel", *lines, attached, tokenizer])


def _of_run(artefact: Artefact, name: str) -> dict[str, Any]:
    """Return a JSON file of the run that an artefact lies in; empty where there is none."""
    if artefact.recipe is None:
        return {}
    file = artefact.recipe.parent / name
    return read_json(file) if file.is_file() else {}


def _file_of(base: str, name: str) -> Path | None:
    place = Path(resolve(base)).expanduser()
    if place.is_dir():
        return place / name if (place / name).is_file() else None
    cached = None if place.is_absolute() else try_to_load_from_cache(str(place), name)
    return Path(cached) if isinstance(cached, str) else None


def _mapping(text: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}
