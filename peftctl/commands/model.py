"""`peftctl model`: what a model, a recipe, a run or an adapter is made of, and what training changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from peftctl.artifacts import ranks
from peftctl.artifacts.locate import Artefact, fetched, locate
from peftctl.commands.model_change import change
from peftctl.commands.model_prompt import prompt_report
from peftctl.commands.model_recipe import recipe_report
from peftctl.commands.model_report import Report, Table, ranks_report, share
from peftctl.console import figure
from peftctl.errors import ArtifactError, UsageError
from peftctl.methods._targets import WORDS, in_out_features, matched_modules
from peftctl.models.aliases import ALIASES
from peftctl.models.load import meta_model
from peftctl.models.outline import Node, outline
from peftctl.recipe.paths import shipped_names
from peftctl.recipe.schema import ModelSection

_NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits a weight in NF4 with double quantisation: 4, an 8-bit scale for 64, a 32-bit one for 256 of those."""
_TARGETS = "--targets"
_TASKS = {
    "ForConditionalGeneration": "seq2seq_lm",
    "ForSequenceClassification": "seq_cls",
    "ForTokenClassification": "token_cls",
}
"""What the class named in config.json ends with -> our task; all others are taken as language models."""


def inspect(
    target: str,
    overrides: Sequence[str] = (),
    *,
    targets: str | None = None,
    rank: int = 8,
    against: str | None = None,
    nearest: int = 5,
) -> Report:
    """Show what a target is made of.

    Args:
        target: A model: its tree. A recipe: what it trains. A run or an adapter: ranks and alphas, and of a soft
            prompt the vocabulary tokens nearest to each virtual token.
        overrides: KEY=VALUE on a recipe.
        targets: A `target_modules` value (YAML) to show in a model's tree.
        rank: r that LoRA parameters are counted for.
        against: Show the change from this model, run, adapter or checkpoint to `target` instead.
        nearest: How many vocabulary tokens to show.

    Raises:
        UsageError: The target is none of these, or an option does not fit it.
        ArtifactError: Files are damaged.
    """
    if against is not None:
        _refuse(overrides, targets, f"--against compares {target} with {against}")
        return change(target, against)
    if _is_recipe(target):
        _refuse((), targets, f"{target} is a recipe; change it with method.target_modules=VALUE")
        return recipe_report(target, overrides)
    artefact = fetched(locate(target))
    if artefact.is_adapter:
        _refuse(overrides, targets, f"{target} is an adapter; give a model or a recipe")
        return _of_adapter(artefact, nearest)
    _refuse(overrides, None, f"{target} is a model; KEY=VALUE changes a recipe")
    return _of_model(artefact, targets, rank)


def _refuse(overrides: Sequence[str], targets: str | None, why: str) -> None:
    wrong = overrides[0] if overrides else _TARGETS if targets is not None else None
    if wrong:
        raise UsageError(f"{wrong}: does not go here: {why}")


def _is_recipe(target: str) -> bool:
    path = Path(target).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return True
    return target in shipped_names() and target not in ALIASES and not path.exists()


def _of_model(artefact: Artefact, targets: str | None, rank: int) -> Report:
    model = _shapes_of(str(artefact.folder or artefact.target), artefact.manifest.get("task"))
    wanted: dict[str, Any] = {word: word for word in WORDS}
    if targets is not None:
        wanted[_TARGETS] = _parsed(targets)
    selections = _selections(model, wanted)
    rows = outline(model, selections)
    total = sum(p.numel() for p in model.parameters())
    lora = {name: _lora_parameters(modules.values(), rank) for name, modules in selections.items()}
    summary = [
        [_TARGETS + " " + str(targets) if name == _TARGETS else name, str(len(modules)), figure(lora[name]),
         share(lora[name], total)]
        for name, modules in selections.items()
    ]  # fmt: skip
    sizes = _sizes(total, selections.get("all-linear", {}))
    content = {
        "architecture": type(model).__name__,
        "parameters": total,
        "bytes": sizes,
        "rank": rank,
        "selected_modules": len(selections.get(_TARGETS, {})),
        "selections": {name: {"modules": len(m), "lora_parameters": lora[name]} for name, m in selections.items()},
        "modules": [_as_data(row) for row in rows],
    }
    weights = ", ".join(f"{size / 2**20:,.0f} MiB in {name}" for name, size in sizes.items())
    title = f"{type(model).__name__}: {total:,} parameters; {weights}"
    return Report(content, [_tree(title, rows), ("", ["selected by", "modules", f"LoRA at r {rank}", ""], summary)])


def _shapes_of(name: str, task: str | None) -> Any:
    """Return the model without weights, with the head that it was stored with."""
    known = [task] if task is not None else ["causal_lm", "seq2seq_lm"]
    model = _first_that_builds(name, known)
    stored = (model.config.architectures or [""])[0]
    kind = next((task for end, task in _TASKS.items() if stored.endswith(end)), None)
    if task is not None or kind is None or stored == type(model).__name__:
        return model
    return _first_that_builds(name, [kind, *known])  # of a model of images and text the language model is taken


def _first_that_builds(name: str, tasks: Sequence[str]) -> Any:
    """Return the model without weights for the first task that it can do; the first failure where it can do none."""
    failure: UsageError | ArtifactError | None = None
    for task in tasks:
        try:
            section = ModelSection(name_or_path=name, task=task)  # type: ignore[arg-type]  # one of schema.Task
            return meta_model(section, allow_stand_in=True)
        except (UsageError, ArtifactError) as error:
            failure = failure or error
    assert failure is not None  # there is at least one task
    raise failure


def _parsed(targets: str) -> Any:
    try:
        value = yaml.safe_load(targets)
    except yaml.YAMLError:
        value = targets  # a regular expression that is no YAML, such as `[a-z]+\.(q|v)_proj`
    if isinstance(value, list) and value and all(isinstance(entry, str) for entry in value):
        return value
    if isinstance(value, str) and value:
        return value
    raise UsageError(
        f"{_TARGETS}: expected {', '.join(WORDS)}, a regular expression or a list of names such as "
        f"'[q_proj, v_proj]', got '{targets}'"
    )


def _selections(model: Any, wanted: Mapping[str, Any]) -> dict[str, dict[str, nn.Module]]:
    """Return the modules of every selection; of the words, those that select something."""
    found = {}
    for name, value in wanted.items():
        try:
            found[name] = matched_modules(model, value)
        except UsageError as error:
            if name == _TARGETS:
                raise UsageError(str(error).replace("method.target_modules", _TARGETS, 1)) from error
    return found


def _lora_parameters(modules: Any, rank: int) -> int:
    return sum(rank * sum(in_out_features(module)) for module in modules)


def _sizes(total: int, quantised: Mapping[str, nn.Module]) -> dict[str, int]:
    """Return bytes of the weights by type; in NF4 all linear layers but the head, and the rest in bfloat16."""
    linear = sum(math.prod(in_out_features(module)) for module in quantised.values())
    return {"float32": 4 * total, "bfloat16": 2 * total, "nf4": round(linear * _NF4_BITS / 8 + 2 * (total - linear))}


def _tree(title: str, rows: Sequence[Node]) -> Table:
    cells = [
        [
            "  " * row.depth + row.label,
            row.kind,
            row.shape,
            figure(row.parameters),
            ", ".join([*row.marks, *([f"tied to {row.tied}, counted there"] if row.tied else [])]),
        ]
        for row in rows
    ]
    return title, ["module", "type", "shape", "parameters", "selected by"], cells


def _as_data(row: Node) -> dict[str, Any]:
    return {
        "name": row.name,
        "depth": row.depth,
        "type": row.kind,
        "shape": row.shape,
        "parameters": row.parameters,
        "count": row.count,
        "tied_to": row.tied or None,
        "selected": _TARGETS in row.marks,
        "selected_by": list(row.marks),
    }


def _of_adapter(artefact: Artefact, k: int) -> Report:
    if not artefact.has_weights or artefact.folder is None:
        raise UsageError(f"{artefact.target}: is a template without weights; give its base, {artefact.base}")
    rows = ranks.of_folder(artefact.folder)
    size = sum(row.parameters for row in rows)
    method = artefact.manifest.get("method") or ranks.peft_type(artefact.folder)
    content = {"target": artefact.target, "method": method, "base": artefact.base}
    report = ranks_report(f"{method} adapter of {artefact.base}: {size:,} parameters", rows, content)
    return prompt_report(artefact, k, report)
