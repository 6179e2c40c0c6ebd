"""README.md of an artefact: what it is, what it was made from, its figures, and how to load it without peftctl."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import PreTrainedModel

from peftctl.artifacts.manifest import portable_name
from peftctl.models.aliases import ALIASES, resolve
from peftctl.models.load import AUTO_CLASSES
from peftctl.recipe.schema import Recipe

if TYPE_CHECKING:
    from peftctl.artifacts.manifest import ArtifactInfo


def render_card(exported: Any, info: ArtifactInfo) -> str:
    """Return the model card of a run's result.

    Args:
        exported: What was saved: a PeftModel, a PreTrainedModel, or None for a tokenizer with its template.
        info: What there is to say.
    """
    recipe, card = info.recipe, info.card
    whole = isinstance(exported, PreTrainedModel)
    base = public_name(recipe.model.name_or_path)
    rows = {"method": f"{card.title} ({card.paper})", "trains": card.trains, "base model": f"`{base}`"}
    rows |= {"base weights (fingerprint)": f"`{info.base_fingerprint}`"}
    rows |= {name.replace("_", " "): _figure(value) for name, value in info.facts.items() if _is_known(value)}
    return "\n".join(
        [
            _front_matter(base, info.method, library="transformers" if whole or exported is None else "peft"),
            f"# {base}, fine-tuned with {card.title}\n",
            f"{card.summary}\n",
            _table(rows),
            "## How to load it\n",
            _snippet(exported, recipe),
            "With peftctl: `peftctl chat DIRECTORY`, or `model, tokenizer = peftctl.load(DIRECTORY)`.\n",
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
    rows = {name.replace("_", " "): _figure(value) for name, value in figures.items()}
    return "\n".join(
        [
            _front_matter(name, method, library="transformers"),
            f"# {name}, with an adapter ({method}) merged in\n",
            f"The adapter `{Path(source).name}` is folded into the weights. Compared with the unmerged model:\n",
            _table(rows),
            "## How to load it\n",
            _code(_whole("DIRECTORY", task)),
        ]
    )


def public_name(name_or_path: str) -> str:
    """Return how a base is called outside this machine: its hub id, or the name of its directory."""
    name = ALIASES.get(name_or_path, name_or_path)
    return Path(name).name if Path(name).exists() else name


def _front_matter(base: str, method: str, *, library: str) -> str:
    fields = {"library_name": library, "base_model": base, "tags": ["peftctl", method]}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def _snippet(exported: Any, recipe: Recipe) -> str:
    """Return Python that loads the artefact with the libraries alone."""
    if isinstance(exported, PreTrainedModel):
        return _code(_whole("DIRECTORY", recipe.model.task))
    place = portable_name(resolve(recipe.model.name_or_path))
    base = _base(place, recipe.model.task, recipe.model.dtype)
    tokenizer = 'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")'
    if exported is None:
        return _code([*base, tokenizer])
    from peft import PeftType

    stock = exported.peft_config["default"].peft_type in list(PeftType)
    first = [] if stock else ["import peftctl  # first: it adds this adapter's type to peft"]
    adapter = 'model = PeftModel.from_pretrained(base, "DIRECTORY")'
    return _code([*first, "from peft import PeftModel", *base, adapter, tokenizer])


def _base(place: str, task: str, dtype: str) -> list[str]:
    auto, path = AUTO_CLASSES[task], Path(place)
    where = f'"{path.parent}", gguf_file="{path.name}"' if path.suffix == ".gguf" else f'"{place}"'
    return [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'base = {auto}.from_pretrained({where}, dtype="{dtype}")',
    ]


def _whole(place: str, task: str) -> list[str]:
    auto = AUTO_CLASSES[task]
    return [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'model = {auto}.from_pretrained("{place}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
    ]


def _code(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```", ""])


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""])


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))
