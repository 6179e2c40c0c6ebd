"""Rules between keys: combinations that contradict each other, and keys that nothing would read."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from peftctl.errors import did_you_mean
from peftctl.recipe.nodes import Finding, Path, Place, Table, dotted, find, key_place
from peftctl.recipe.overrides import RIVALS

FORMAT_FIELDS = {
    "messages": ("messages", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "alpaca": ("instruction", "input", "output", "system", "wrong_answers"),
    "prompt_completion": ("prompt", "completion", "wrong_answers"),
    "text": ("text",),
    "labelled_text": ("text", "label"),
    "tokens_tags": ("tokens", "tags"),
}

# Formats without an exchange to render: every token of a text is trained on, and labels are no tokens.
UNREAD_BY_FORMAT = dict.fromkeys(("text", "labelled_text", "tokens_tags"), ("template", "loss_on"))

_GENERATED = ("exact_match", "rouge_l", "contains", "regex")
_LANGUAGE_METRICS = ("loss", "perplexity", "token_accuracy", *_GENERATED)
_METRICS_OF_TASK = {
    "seq_cls": ("loss", "accuracy", "macro_f1"),
    "token_cls": ("loss", "accuracy", "macro_f1", "entity_f1"),
}

_FORMAT_OF_TASK = {"seq_cls": "labelled_text", "token_cls": "tokens_tags"}
_ANSWER_FORMATS = ("messages", "sharegpt", "alpaca", "prompt_completion")


@dataclass(frozen=True)
class View:
    """A recipe as the rules see it, whether or not all of it is valid.

    Args:
        root: The tree, for places.
        values: Dotted key -> valid value, defaults included; keys with an error are missing.
        explicit: Dotted keys that the recipe or an override sets.
    """

    root: Table
    values: Mapping[str, Any]
    explicit: frozenset[str]

    def at(self, *keys: str) -> Place:
        """Return the place of the first of these dotted keys that is explicit, else of the first one's section."""
        key = next((key for key in keys if key in self.explicit), keys[0])
        return key_place(self.root, tuple(key.split(".")))


DIVISIBLE = ("adamw", "sgd")
"""Optimizers whose state has the shape of the weights: ZeRO cuts both alike."""


@dataclass(frozen=True)
class Layout:
    """How some rows are laid out, and which keys say so.

    Args:
        format: Their format.
        columns: Our field name -> theirs.
        format_at: Path of the key that sets the format.
        columns_at: Path of the key that sets the columns.
    """

    format: str
    columns: Mapping[str, str]
    format_at: Path = ("data", "format")
    columns_at: Path = ("data", "columns")


def conflicts(view: View) -> Iterator[Finding]:
    """Yield every broken rule."""
    yield from _rivals(view)
    yield from _unread_by_format(view)
    yield from _format_and_task(view)
    yield from _labels(view)
    yield from _metrics_and_task(view)
    yield from _columns(view)
    yield from _pattern(view)
    yield from _training_rows(view)
    yield from _quantization(view)
    yield from _backend(view)
    yield from _held_out(view)
    if view.values.get("data.packing"):
        yield Finding(view.at("data.packing"), "data.packing: packing is not in this version", "set it to false")


def unread_by_method(view: View, method: str, unread: frozenset[str]) -> Iterator[Finding]:
    """Yield explicit keys that the method never reads; a section in `unread` stands for all its keys."""
    for key in sorted(view.explicit):
        if key in unread or key.split(".")[0] in unread:
            yield Finding(view.at(key), f"method '{method}' does not read {key}", "remove it")


def _rivals(view: View) -> Iterator[Finding]:
    for one, other in RIVALS:
        pair = [".".join(one), ".".join(other)]
        if view.explicit.issuperset(pair):
            earlier, later = sorted(pair, key=lambda key: view.at(key).order)
            yield Finding(view.at(later), f"{later}: contradicts {earlier}, which is set too", "keep one of the two")


def _training_rows(view: View) -> Iterator[Finding]:
    keys = ("data.train", "data.sources")
    if all(key in view.values and view.values[key] is None for key in keys):
        yield Finding(view.at(*keys), "data.train: required key is missing", "add it under `data:`, or data.sources")
    if view.values.get("data.sources") == []:
        yield Finding(view.at("data.sources"), "data.sources: expected at least one source, got an empty list")


def _quantization(view: View) -> Iterator[Finding]:
    if "quantization.bits" not in view.values:
        return
    bits = view.values["quantization.bits"]
    for key in ("type", "double_quant", "compute_dtype"):
        name = f"quantization.{key}"
        value = view.values.get(name)
        if value is None:
            continue
        if bits is None:
            yield Finding(view.at(name), f"{name}: nothing is quantised without quantization.bits", "set it to 4 or 8")
        elif key == "type" and (value == "int8") != (bits == 8):
            fitting = "int8" if bits == 8 else "nf4 or fp4"
            yield Finding(view.at(name), f"{name}: {value} has not {bits} bits", f"use {fitting}, or change bits")
        elif key != "type" and bits == 8:
            yield Finding(view.at(name), f"{name}: only 4-bit weights read it", "remove it")


def _backend(view: View) -> Iterator[Finding]:
    name, config = view.values.get("backend.name"), view.values.get("backend.config")
    if name in ("single", "fsdp") and config is not None:
        yield Finding(
            view.at("backend.config"), "backend.config: only deepspeed reads it", "set backend.name: deepspeed"
        )
    if name == "deepspeed" and config is None and "backend.config" in view.values:
        hint = "add config: configs/deepspeed/zero2.json under `backend:`"
        yield Finding(view.at("backend.name"), "backend.config: deepspeed needs a configuration file", hint)
    if name not in ("deepspeed", "fsdp"):
        return
    if view.values.get("train.tokens_per_pass"):
        message = f"train.tokens_per_pass: through {name} a micro-batch takes one pass"
        yield Finding(view.at("train.tokens_per_pass"), message, "remove it, or lower train.batch_size")
    optimizer = view.values.get("train.optimizer")
    if optimizer not in (None, *DIVISIBLE):
        message = f"train.optimizer: {optimizer} can't be divided among processes by {name}"
        yield Finding(view.at("train.optimizer", "backend.name"), message, f"use {' or '.join(DIVISIBLE)}")
    if name == "deepspeed" and view.values.get("train.on_nan") == "skip":
        message = "train.on_nan: deepspeed has taken the step before its gradient can be looked at"
        yield Finding(view.at("train.on_nan"), message, "use stop")
    if name == "fsdp" and view.values.get("quantization.bits"):
        message = "quantization.bits: fsdp would leave quantised weights whole in every process"
        hint = "use deepspeed with configs/deepspeed/zero3.json, which divides them, or remove it"
        yield Finding(view.at("quantization.bits", "backend.name"), message, hint)


def _held_out(view: View) -> Iterator[Finding]:
    """Yield what asks for held-out losses where none are measured."""
    measured = view.explicit & {"data.eval", "data.eval_fraction"}
    if "train.eval_steps" in view.explicit and not measured:
        message = "train.eval_steps: there are no held-out rows to measure"
        yield Finding(view.at("train.eval_steps"), message, "set data.eval or data.eval_fraction, or remove it")
    for key in ("train.load_best", "train.early_stopping"):
        if view.values.get(key) and not (measured and view.values.get("train.eval_steps")):
            message = f"{key}: needs held-out losses during training"
            yield Finding(view.at(key), message, "set data.eval (or data.eval_fraction) and train.eval_steps")


def unread_by_all(formats: Iterable[str]) -> list[str]:
    """Return the keys of `data:` that none of these formats reads, at least one being given."""
    first, *others = [UNREAD_BY_FORMAT.get(name, ()) for name in formats]
    return [key for key in first if all(key in unread for unread in others)]


def _layouts(view: View) -> Iterator[Layout]:
    """Yield the layout of every kind of rows; of none whose keys have errors."""
    name, columns, sources = (view.values.get(f"data.{key}") for key in ("format", "columns", "sources"))
    if name is None or columns is None or "data.sources" not in view.values:
        return
    if sources is None or view.values.get("data.eval") is not None:
        yield Layout(name, columns)
    for i, source in enumerate(sources or ()):
        layout = Layout(name, columns)
        if source.get("format"):
            layout = replace(layout, format=source["format"], format_at=("data", "sources", i, "format"))
        if source.get("columns") is not None:
            layout = replace(layout, columns=source["columns"], columns_at=("data", "sources", i, "columns"))
        yield layout


def _unread_by_format(view: View) -> Iterator[Finding]:
    formats = dict.fromkeys(layout.format for layout in _layouts(view))
    for key in unread_by_all(formats) if formats else ():
        if f"data.{key}" in view.explicit:
            message = f"data.{key}: format {' or '.join(formats)} does not read it"
            yield Finding(view.at(f"data.{key}"), message, "remove it")


def _format_and_task(view: View) -> Iterator[Finding]:
    task = view.values.get("model.task")
    if task is None:
        return
    wanted = _FORMAT_OF_TASK.get(task)
    fitting = [wanted] if wanted else [*_ANSWER_FORMATS, *(["text"] if task == "causal_lm" else [])]
    if view.values.get("data.loss_on") == "all" and task == "seq2seq_lm":
        message = "data.loss_on: all has no meaning for seq2seq_lm: it reads prompts and writes answers"
        yield Finding(view.at("data.loss_on"), message, "remove it")
    for layout in _layouts(view):
        if layout.format in fitting:
            continue
        key = dotted(layout.format_at)
        place = key_place(view.root, layout.format_at) if len(layout.format_at) > 2 else view.at(key, "model.task")
        message = f"{key}: {layout.format} does not fit model.task {task}"
        yield Finding(place, message, f"use {' or '.join(fitting)}, or change model.task")


def _labels(view: View) -> Iterator[Finding]:
    labels, task = view.values.get("data.labels"), view.values.get("model.task")
    if labels is None:
        return
    if task is not None and task not in _FORMAT_OF_TASK:
        message = f"data.labels: {task} has no classes; only {' and '.join(_FORMAT_OF_TASK)} read it"
        yield Finding(view.at("data.labels"), message, "remove it, or change model.task")
    names = [str(label) for label in labels]
    if len(names) < 2:
        yield Finding(view.at("data.labels"), f"data.labels: expected at least two classes, got {len(names)}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield Finding(view.at("data.labels"), f"data.labels: {', '.join(twice)} twice", "list each label once")


def _metrics_and_task(view: View) -> Iterator[Finding]:
    task, metrics = view.values.get("model.task"), view.values.get("eval.metrics")
    if task is None or metrics is None:
        return
    fitting = _METRICS_OF_TASK.get(task, _LANGUAGE_METRICS)
    if wrong := [metric for metric in metrics if metric not in fitting]:
        message = f"eval.metrics: {', '.join(wrong)} does not fit model.task {task}"
        yield Finding(view.at("eval.metrics"), message, f"use {', '.join(fitting)}")


def _columns(view: View) -> Iterator[Finding]:
    for layout in _layouts(view):
        known = FORMAT_FIELDS[layout.format]
        for field in layout.columns:
            if field in known:
                continue
            path: Path = (*layout.columns_at, field)
            message = f"{dotted(path)}: not a field of format {layout.format}"
            hint = did_you_mean(field, known)
            if len(layout.format_at) > len(layout.columns_at):
                hint = f"give {dotted(layout.format_at[:-1])}, which has that format, columns of its own"
            yield Finding(key_place(view.root, path), message, hint)


def _pattern(view: View) -> Iterator[Finding]:
    metrics, pattern = view.values.get("eval.metrics"), view.values.get("eval.pattern")
    if "eval.metrics" not in view.values or "eval.pattern" not in view.values:
        return
    metrics = metrics or ()
    if pattern is not None and not {"contains", "regex"} & set(metrics):
        message = "eval.pattern: only the metrics contains and regex read it"
        yield Finding(view.at("eval.pattern"), message, "add one of them to eval.metrics, or remove it")
    if "regex" not in metrics:
        return
    if pattern is None:
        yield Finding(view.at("eval.metrics"), "eval.metrics: regex needs eval.pattern", "set eval.pattern")
        return
    try:
        with warnings.catch_warnings(action="ignore"):
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        where = find(view.root, ("eval", "pattern"))
        place = where.place if where else view.at("eval.pattern")
        yield Finding(place, f"eval.pattern: not a regular expression ({error})", "correct it")
