"""What a field of the schema expects, in plain words, read from its annotation."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from peftctl.recipe.nodes import BROKEN, Items, Node, Path, Table

_SIMPLE = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "nothing",
    Any: "any value",
}
_PLURAL = {int: "integers", float: "numbers", str: "texts"}


def annotation_of(field: FieldInfo) -> Any:
    """Return a field's annotation together with its bounds."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def annotation_at(annotation: Any, path: Path) -> Any:
    """Return the annotation of what lies at a path below an annotation, or None where it says nothing."""
    for step in path:
        annotation = next((inner for branch in _branches(annotation) if (inner := _inside(branch, step))), None)
    return annotation


def fields_at(annotation: Any, path: Path) -> Mapping[str, FieldInfo]:
    """Return the fields of the model at a path below an annotation; empty where that is no model."""
    models = (branch for branch in _branches(annotation_at(annotation, path)) if _is_model(branch))
    return next((model.model_fields for model in models), {})


def in_words(annotation: Any, *, bounds: bool) -> str:
    """Return what an annotation expects, e.g. `an integer above 0`.

    Args:
        annotation: Of a field, or of a part of one.
        bounds: Whether to say the bounds of numbers.
    """
    words = list(dict.fromkeys(_branch_words(branch, bounds) for branch in _branches(annotation)))
    words = [word for word in words if word != "nothing"] or words
    if "a number" in words and "an integer" in words:
        words.remove("an integer")
    return " or ".join(words)


def choices(annotation: Any) -> list[str]:
    """Return the values that the literals of an annotation name."""
    literals = (branch for branch in map(_bare, _branches(annotation)) if get_origin(branch) is Literal)
    return [str(value) for literal in literals for value in get_args(literal)]


def got(node: Node) -> str:
    """Return what a node holds, in plain words."""
    if isinstance(node, Table):
        return "a mapping"
    if isinstance(node, Items):
        return "a list"
    value = node.raw if node.value is BROKEN else node.value
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'text "{value}"' if len(value) <= 60 else f'text "{value[:60]}..."'
    return str(value)


def did_you_mean_one(name: str, known: Iterable[str]) -> str:
    """Return `did you mean 'x'?` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.55)
    return f"did you mean '{near[0]}'?" if near else ""


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _branches(annotation: Any) -> list[Any]:
    """Return the alternatives of a union; bounds around the union are kept on each."""
    bare = _bare(annotation)
    if get_origin(bare) not in (Union, types.UnionType):
        return [annotation]
    around = get_args(annotation)[1:] if bare is not annotation else ()
    return [leaf for arg in get_args(bare) for leaf in _branches(Annotated[arg, *around] if around else arg)]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _inside(annotation: Any, step: str | int) -> Any:
    bare = _bare(annotation)
    arguments = get_args(bare)
    if _is_model(bare):
        return annotation_of(bare.model_fields[str(step)]) if step in bare.model_fields else None
    if isinstance(step, int) and get_origin(bare) is list:
        return arguments[0]
    if isinstance(step, str) and get_origin(bare) is dict:
        return arguments[1]
    return None


def _branch_words(annotation: Any, bounds: bool) -> str:
    bare = _bare(annotation)
    if get_origin(bare) is Literal:
        values = [str(value) for value in get_args(bare)]
        return values[0] if len(values) == 1 else "one of " + ", ".join(values)
    if get_origin(bare) is list:
        inner = _bare(get_args(bare)[0])
        return f"a list of {_PLURAL[inner]}" if inner in _PLURAL else "a list"
    if get_origin(bare) is dict or bare in (dict, list) or _is_model(bare):
        return "a list" if bare is list else "a mapping"
    word = _SIMPLE.get(bare, "another type")
    return " ".join([word, *_bound_words(annotation)]) if bounds else word


def _bound_words(annotation: Any) -> list[str]:
    metadata = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    flat = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    words = []
    for part in flat:
        match part:
            case Gt(gt=limit):
                words.append(f"above {_figure(limit)}")
            case Ge(ge=limit):
                words.append(f"of at least {_figure(limit)}")
            case Lt(lt=limit):
                words.append(f"below {_figure(limit)}")
            case Le(le=limit):
                words.append(f"of at most {_figure(limit)}")
    return [" and ".join(words)] if words else []


def _figure(limit: Any) -> str:
    """Return 0 for 0.0 too: typing keeps one of two equal annotations, whichever was made first."""
    return str(int(limit)) if limit == int(limit) else str(limit)
