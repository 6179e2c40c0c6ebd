"""README.md of an artefact: what it is, what it was made from, its figures, and how to load it without peftctl."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import PreTrainedModel

from peftctl.artifacts.manifest import portable_name, read
from peftctl.methods import registry
from peftctl.models.aliases import ALIASES, resolve
from peftctl.models.classifier import classification_task, labels_of
from peftctl.models.load import AUTO_CLASSES
from peftctl.models.vocabulary import vocabulary_rows
from peftctl.recipe.schema import CLASSIFICATION

if TYPE_CHECKING:
    from peftctl.artifacts.manifest import ArtifactInfo


def render_card(exported: Any, info: ArtifactInfo, manifest: Mapping[str, Any]) -> str:
    """Return the model card of a run's result.

    Args:
        exported: What was saved: a PeftModel, a PreTrainedModel, or None for a tokenizer with its template.
        info: What there is to say.
        manifest: The content of its peftctl.json.
    """
    recipe, card = info.recipe, info.card
    whole = isinstance(exported, PreTrainedModel)
    base = public_name(recipe.model.name_or_path)
    rows = {"method": f"{card.title} ({card.paper})", "trains": card.trains, "base model": f"`{base}`"}
    rows |= {**merged_before(recipe.model.name_or_path), "base weights (fingerprint)": f"`{info.base_fingerprint}`"}
    if own := manifest.get("own_task"):
        others = [f"`{name}/`" for name in manifest["tasks"] if name != own["name"]]
        rows["task"] = own["name"] + (f"; others: {', '.join(others)}" if others else "")
    rows |= {name.replace("_", " "): figure(value) for name, value in info.facts.items() if is_known(value)}
    use = shown_use("DIRECTORY", recipe.model.task)
    return "\n".join(
        [
            front_matter(base, info.method, library="transformers" if whole or exported is None else "peft"),
            f"# {base}, fine-tuned with {card.title}\n",
            f"{card.summary}\n",
            table(rows),
            "## How to load it\n",
            _snippet(exported, info),
            f"With peftctl: `{use}`, or `model, tokenizer = peftctl.load(DIRECTORY)`.\n",
        ]
    )


def render_merged_card(base: str, method: str, source: str, task: str, figures: Mapping[str, Any]) -> str:
    """Return the model card of a merged model.

    Args:
        base: What it was merged into.
        method: What the adapter was trained with.
        source: The adapter.
        task: The model's task.
        figures: Of the parity gate.
    """
    name = public_name(base)
    rows = merged_before(base) | {name.replace("_", " "): figure(value) for name, value in figures.items()}
    return "\n".join(
        [
            front_matter(name, method, library="transformers"),
            f"# {name}, with an adapter ({method}) merged in\n",
            f"The adapter `{Path(source).name}` is folded into the weights. Compared with the unmerged model:\n",
            table(rows),
            "## How to load it\n",
            code(whole_lines("DIRECTORY", task)),
        ]
    )


def shown_use(place: str, task: str) -> str:
    """Return the command that shows what an artefact can do."""
    return f"peftctl eval {place} --recipe FILE" if task in CLASSIFICATION else f"peftctl chat {place}"


def head_record(exported: Any) -> dict[str, Any] | None:
    """Return what a classifier's head was made for; None for a language model."""
    if exported is None or classification_task(exported) is None:
        return None
    return {"labels": labels_of(exported), "pad_token_id": exported.config.pad_token_id}


def changed_config(exported: Any, info: ArtifactInfo) -> dict[str, Any]:
    """Return what the base's configuration must be changed to: by the method, and to rows for new tokens."""
    if exported is None:
        return {}
    changes = dict(registry.get(info.method)(info.recipe.method).config_changes(exported))
    return changes | ({"vocab_size": vocabulary_rows(exported)} if info.recipe.model.add_tokens else {})


def public_name(name_or_path: str) -> str:
    """Return how a base is called outside this machine: its hub id, or the name of its directory.

    A base with adapters merged in, made by a run for itself, is called as what it was made of.
    """
    name = ALIASES.get(name_or_path, name_or_path)
    if "adapters" in (record := read(Path(name))):
        return public_name(record["base"]["name"])
    return Path(name).name if Path(name).exists() else name


def merged_before(name_or_path: str) -> dict[str, str]:
    """Return a row on the adapters that a base has merged in, none for other bases."""
    names = [f"{a['name']} ({a['method']})" for a in read(Path(name_or_path)).get("adapters", [])]
    return {"merged into the base before": ", ".join(names)} if names else {}


def front_matter(base: str, method: str, *, library: str, license: str | None = None) -> str:
    """Return the head of a card that hubs read."""
    fields: dict[str, Any] = {"library_name": library, "base_model": base, "tags": ["peftctl", method]}
    if license is not None:
        fields["license"] = license
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def _snippet(exported: Any, info: ArtifactInfo) -> str:
    """Return Python that loads the artefact with the libraries alone."""
    recipe, changed = info.recipe, changed_config(exported, info)
    if isinstance(exported, PreTrainedModel):
        return code(whole_lines("DIRECTORY", recipe.model.task))
    place = portable_name(resolve(recipe.model.name_or_path))
    rope = changed.get("rope_parameters")
    base = base_lines(place, recipe.model.task, recipe.model.dtype, head_record(exported), rope)
    tokenizer = 'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")'
    if exported is None:
        return code([*base, tokenizer])
    if rows := changed.get("vocab_size"):
        base = [*base, f"base.resize_token_embeddings({rows})  # rows of the added tokens"]
    first = type_lines(exported.peft_config["default"].peft_type)
    adapter = 'model = PeftModel.from_pretrained(base, "DIRECTORY")'
    return code([*first, "from peft import PeftModel", *base, adapter, tokenizer])


def type_lines(peft_type: str) -> list[str]:
    """Return the lines of Python after which peft knows a type of adapter; none for its own."""
    from peft import PeftType

    if peft_type in list(PeftType):
        return []
    return [
        f"import peftctl.tuners  # first: it adds the adapter type {peft_type} to peft,",
        "# which stops with a KeyError without it (pip install peftctl)",
    ]


def base_lines(
    place: str,
    task: str,
    dtype: str,
    head: Mapping[str, Any] | None = None,
    rope: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return the lines of Python that load a base model.

    Args:
        place: Directory, .gguf file or hub id.
        task: Decides the class.
        dtype: Of the weights.
        head: Of a classifier, see `manifest.build`.
        rope: The positions that the adapter was trained with, where they are not the base's own.
    """
    auto, path = AUTO_CLASSES[task], Path(place)
    where = f'"{path.parent}", gguf_file="{path.name}"' if path.suffix == ".gguf" else f'"{place}"'
    said = "# positions as in training: without them the adapter does not fit"
    positions = [said, f"rope = {dict(rope)}"] if rope else []
    options = _head_options(head) + (", rope_parameters=rope" if rope else "")
    return [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        *positions,
        f'base = {auto}.from_pretrained({where}, dtype="{dtype}"{options})',
    ]


def _head_options(head: Mapping[str, Any] | None) -> str:
    if not head:
        return ""
    return f", id2label={dict(enumerate(head['labels']))}, pad_token_id={head['pad_token_id']}"


def whole_lines(place: str, task: str) -> list[str]:
    """Return the lines of Python that load a whole model."""
    auto = AUTO_CLASSES[task]
    return [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'model = {auto}.from_pretrained("{place}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
    ]


def code(lines: list[str]) -> str:
    """Return a block of Python."""
    return "\n".join(["```python", *lines, "```", ""])


def table(rows: Mapping[str, str]) -> str:
    """Return a table of two columns without a head."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""])


def figure(value: Any) -> str:
    """Return a value as a card shows it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def is_known(value: Any) -> bool:
    """Tell a figure from None and NaN, which say that there is none."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))
