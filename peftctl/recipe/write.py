"""Writes a typed recipe as YAML that reads back to the same recipe, and tells two recipes apart."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from peftctl.recipe.rules import unread_by_all
from peftctl.recipe.schema import DataSection, Recipe
from peftctl.recipe.tree import resolve_scalar

_UNSET = "unset"


def dump_recipe(recipe: Recipe, unread: Collection[str] = ()) -> str:
    """Return a recipe as YAML in block style, in the order of the schema.

    Left out is what reading would refuse or take as silence: keys that nothing reads, and nulls (but for a null that
    was set against another default).

    Args:
        recipe: Any valid recipe.
        unread: Dotted keys that the method never reads.
    """
    silent = {*unread, *(f"data.{key}" for key in unread_by_all(_formats(recipe.data)))}
    if recipe.train.max_steps is not None:
        silent.add("train.epochs")
    sections = {}
    for name, section in recipe:
        kept = {
            key: _escaped(value)
            for key, value in section
            if f"{name}.{key}" not in silent and name not in silent and not _is_silent_null(section, key, value)
        }
        if kept:
            sections[name] = kept
    return yaml.dump(
        sections, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=4096
    )


def diff_recipes(old: Recipe, new: Recipe, ignore: Collection[str] = ()) -> list[str]:
    """Return what differs, one line a key: `train.learning_rate: 0.0002 -> 0.0001`.

    Args:
        old: The recipe on the left.
        new: The recipe on the right.
        ignore: Dotted keys or sections that may differ.
    """
    before, after = dict(_leaves(old.model_dump())), dict(_leaves(new.model_dump()))
    lines = []
    for key in {**before, **after}:
        ignored = any(key == name or key.startswith(f"{name}.") for name in ignore)
        mine, theirs = before.get(key), after.get(key)
        if not ignored and mine != theirs:
            lines.append(f"{key}: {_shown(mine)} -> {_shown(theirs)}")
    return lines


def _is_silent_null(section: BaseModel, key: str, value: Any) -> bool:
    info = type(section).model_fields[key]
    default = None if info.is_required() else info.get_default(call_default_factory=True)
    return value is None and default is None and key not in section.model_fields_set


def _formats(data: DataSection) -> set[str]:
    """Return the formats of all rows that the section names."""
    own: set[str] = {source.format or data.format for source in data.sources or ()}
    return {*own, data.format} if data.eval is not None or not own else own


def _escaped(value: Any) -> Any:
    """Return the value as plain data, with `${` protected from being read as a variable."""
    if isinstance(value, str):
        return value.replace("${", "$${")
    if isinstance(value, BaseModel):  # an entry of a list; reading keeps no difference between null and silence there
        fields = type(value).model_fields
        return {key: _escaped(item) for key, item in value if item is not None or fields[key].default is not None}
    if isinstance(value, Mapping):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    return value


def _leaves(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        dotted = f"{path}.{key}" if path else str(key)
        if isinstance(item, Mapping):
            yield from _leaves(item, dotted)
        elif isinstance(item, list) and item and all(isinstance(entry, Mapping) for entry in item):
            for i, entry in enumerate(item):
                yield from _leaves(entry, f"{dotted}[{i}]")
        else:
            yield dotted, item


def _shown(value: Any) -> str:
    if value is None:
        return _UNSET
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    return str(value)


class _Dumper(yaml.SafeDumper):
    """PyYAML's, with quotes where *our* scalar rules would read something else than the text."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal objects out."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None
    if any(character in text for character in "\x85\u2028\u2029"):
        style = '"'  # elsewhere YAML folds these line breaks into others
    elif not isinstance(resolve_scalar(text), str) or text == "<<":
        style = "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
