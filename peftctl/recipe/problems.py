"""pydantic's errors as findings: the place in the recipe, what was expected, what was found, what to do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from peftctl.errors import did_you_mean
from peftctl.recipe.expected import annotation_at, choices, did_you_mean_one, fields_at, got, in_words
from peftctl.recipe.nodes import (
    BROKEN,
    Finding,
    Items,
    Node,
    Path,
    Place,
    Scalar,
    Table,
    dotted,
    find,
    key_place,
    plain,
)
from peftctl.recipe.schema import NOT_NEEDED, Recipe
from peftctl.recipe.tree import resolve_scalar

Model = TypeVar("Model", bound=BaseModel)
Errors = dict[Path, list[Mapping[str, Any]]]

_BOUNDS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}
_BOOLEANS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
_OWN_WORDS = {"value_error", "assertion_error"}


@dataclass(frozen=True)
class Context:
    """What messages draw on.

    Args:
        root: The whole recipe.
        unset: Keys that the command line unset.
        homes: Key -> the sections that have it, in words.
    """

    root: Table
    unset: Mapping[Path, Place]
    homes: Mapping[str, str]


@dataclass(frozen=True)
class Validated(Generic[Model]):
    """What a model made of a section.

    Args:
        instance: None where there are errors.
        data: The section's values as they were validated; those with an error are no use.
        errors: By the path from the recipe's root.
    """

    instance: Model | None
    data: Mapping[str, Any]
    errors: Errors


def validate(model: type[Model], root: Table, section: str) -> Validated[Model]:
    """Validate a section against its model.

    A value from the command line or the environment that is no text is taken as the text it was where the model wants
    one (`model.revision=123`). Of errors at nested paths only the deepest count, since a union reports every branch.
    """
    node = root.entries[section].node
    data = plain(node)
    errors: Errors = {}
    for _ in range(2):
        try:
            return Validated(model.model_validate(data), data, {})
        except ValidationError as error:
            errors = _by_path(error, node)
        if not _retype(data, node, errors):
            break
    return Validated(None, data, {(section, *below): found for below, found in errors.items()})


def describe(model: type[BaseModel], errors: Errors, context: Context) -> Iterator[Finding]:
    """Yield the findings that the errors of a section amount to."""
    root = context.root
    for path, found in errors.items():
        kinds = {error["type"] for error in found}
        node = find(root, path)
        if "extra_forbidden" in kinds:
            yield unknown_key(path, fields_at(model, path[1:-1]), context)
        elif "missing" in kinds:
            place = context.unset.get(path) or key_place(root, path)
            yield Finding(place, f"{dotted(path)}: required key is missing", f"add it under `{dotted(path[:-1])}:`")
        elif kinds & _OWN_WORDS:
            place = node.place if isinstance(node, Scalar) else key_place(root, path)
            yield Finding(place, f"{dotted(path)}: {found[0]['ctx']['error']}")
        elif isinstance(node, Scalar) and node.value is BROKEN:
            if node.reason:
                yield Finding(node.place, f"{dotted(path)}: {node.reason}", "put the value in quotes")
        elif node is not None:
            yield _mismatch(annotation_at(model, path[1:]), path, node, found)


def unknown_key(path: Path, known: Iterable[str], context: Context) -> Finding:
    """Return the finding for a key that the schema does not have."""
    key, name, place = str(path[-1]), dotted(path), key_place(context.root, path)
    if name in NOT_NEEDED:
        return Finding(place, f"{name}: not needed: {NOT_NEEDED[name]}", "remove it")
    near = did_you_mean_one(key, known)
    home = f"`{key}` belongs to {context.homes[key]}" if key in context.homes and len(path) <= 2 else ""
    hint = "; ".join(part for part in (near, home) if part)
    if len(path) == 2 and key in Recipe.model_fields and isinstance(find(context.root, path), Table):
        hint = f"`{key}:` is a section; check its indentation"
    elif "." in key:
        hint = "write nested sections; dotted keys are for the command line"
    return Finding(place, f"{name}: unknown key", hint or (did_you_mean(key, known) if known else ""))


def _by_path(error: ValidationError, node: Node) -> Errors:
    found: Errors = defaultdict(list)
    for item in error.errors(include_url=False):
        found[_node_path(item["loc"], node, item["type"] == "missing")].append(item)
    return {
        path: items
        for path, items in found.items()
        if not any(len(p) > len(path) and p[: len(path)] == path for p in found)
    }


def _node_path(location: tuple[int | str, ...], node: Node, missing: bool) -> Path:
    """Return the path that an error's location stands for: pydantic mixes the names of a union's branches into it."""
    path: Path = ()
    for step in location:
        below = find(node, (step,))
        if below is not None:
            path, node = (*path, step), below
    return (*path, location[-1]) if missing else path


def _retype(data: Any, node: Node, errors: Errors) -> bool:
    """Put the raw text where only text is wanted; tell whether anything changed."""
    changed = False
    for path, found in errors.items():
        wrong = find(node, path)
        texts = [error["type"] == "string_type" for error in found]
        if wrong is None or wrong.raw is None or not (all(texts) or (any(texts) and _single(wrong))) or not path:
            continue
        holder = data
        for step in path[:-1]:
            holder = holder[step]
        holder[path[-1]] = wrong.raw
        changed = True
    return changed


def _single(node: Node) -> bool:
    return isinstance(node, Scalar) and node.value is not BROKEN


def _mismatch(annotation: Any, path: Path, node: Node, found: list[Mapping[str, Any]]) -> Finding:
    kinds = {error["type"] for error in found}
    if "finite_number" in kinds:
        return Finding(node.place, f"{dotted(path)}: expected a finite number, got {got(node)}")
    if annotation is None or not (kinds & _BOUNDS or any(kind.endswith(("_type", "_error")) for kind in kinds)):
        return Finding(node.place, f"{dotted(path)}: {found[0]['msg'].lower()}, got {got(node)}")
    words = in_words(annotation, bounds=bool(kinds & _BOUNDS))
    return Finding(node.place, f"{dotted(path)}: expected {words}, got {got(node)}", _remedy(annotation, words, node))


def _remedy(annotation: Any, words: str, node: Node) -> str:
    if isinstance(node, Table):
        return ""
    if isinstance(node, Items):
        return "" if "list" in words else "give one value"
    value = node.value
    if isinstance(value, str):
        return _remedy_of_text(annotation, words, value, node.quoted)
    if value is None:
        return "give a value, or remove the key"
    if "text" in words:
        return "put it in quotes"
    if words == "an integer" and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    return ""


def _remedy_of_text(annotation: Any, words: str, text: str, quoted: bool) -> str:
    if choices(annotation):
        return did_you_mean_one(text, choices(annotation))
    if quoted and ("number" in words or "integer" in words) and isinstance(resolve_scalar(text), int | float):
        return "remove the quotes"
    if words == "true or false" and text.lower() in _BOOLEANS:
        return f"write {_BOOLEANS[text.lower()]}"
    return f"write [{text}]" if words.startswith("a list") and text and not quoted else ""
