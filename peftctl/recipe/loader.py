"""Reads a recipe: YAML, overrides, what the method implies, the schema, the rules between keys, paths."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from peftctl.errors import Problem, RecipeError, did_you_mean
from peftctl.recipe import nodes, paths, problems, rules, tree
from peftctl.recipe.expected import got
from peftctl.recipe.nodes import Entry, Finding, Place, Scalar, Table, find, key_place, plain
from peftctl.recipe.overrides import RIVALS
from peftctl.recipe.overrides import apply as apply_overrides
from peftctl.recipe.schema import Recipe

MAX_BYTES = 1 << 20
RUNS = ("adapters", "prompts", "teachers")
"""Keys of `method:` that name finished runs, one or several or a folder of them; RUN names exactly one."""
RUN = ("decoder", "source_run")


@dataclass(frozen=True)
class MethodSchema:
    """What the loader needs to know of a method.

    Args:
        config: Model of the `method:` section.
        defaults: Dotted key -> value that the method implies where the recipe is silent.
        unread: Dotted keys that the method never reads; setting one is an error.
    """

    config: type[BaseModel]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()


def read_recipe(path: str | Path, overrides: Sequence[str], methods: Mapping[str, MethodSchema]) -> Recipe:
    """Read and check a recipe.

    Args:
        path: A YAML file, or the name of a shipped recipe.
        overrides: `KEY=VALUE` with a dotted key; typed by the schema, a null unsets. A key on the command line
            displaces a rival in the file (`train.max_steps` the file's `train.epochs`).
        methods: Method name -> its schema.

    Returns:
        The recipe. The files of `data:` are absolute paths or a hub id; local models and adapters are absolute too.

    Raises:
        RecipeError: All problems at once, by position.
    """
    file = paths.find_recipe(path)
    shown = str(path) if file == Path(os.path.expanduser(path)) else str(file)
    root, findings = _read_tree(file, shown)
    root, unset, more = apply_overrides(root, overrides)
    draft = _Draft(root, Path(os.path.abspath(file)).parent, methods, unset, [*findings, *more])
    return draft.finish()


def place_of(path: str | Path, overrides: Sequence[str], key: str) -> str:
    """Return where a recipe or an override sets a key, as `file:line:column` or `command line: KEY`.

    For a key that is set nowhere, the nearest section around it; for one that the method implies, also that.

    Args:
        path: As given to `read_recipe`, which has read it without an error.
        overrides: The same.
        key: Dotted.
    """
    file = paths.find_recipe(path)
    root, _ = _read_tree(file, str(path) if file == Path(os.path.expanduser(path)) else str(file))
    root, _, _ = apply_overrides(root, overrides)
    return key_place(root, tuple(key.split("."))).text


def _read_tree(file: Path, shown: str) -> tuple[Table, list[Finding]]:
    """Return a file's tree, and what is wrong with single keys and values of it."""
    try:
        with open(file, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError([Problem(shown, f"can't be read ({error.strerror})", "check its permissions")]) from error
    if len(data) > MAX_BYTES:
        raise RecipeError([Problem(shown, "expected a recipe, got more than 1 MiB", "is it a data file?")])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        message = f"expected UTF-8, got byte 0x{data[error.start]:02x}"
        raise RecipeError([Problem(f"{shown}:{line}", message, "save the file as UTF-8")]) from error
    root, findings = tree.parse(text, shown)
    if isinstance(root, Table):
        return root, findings
    sections = ", ".join(f"{name}:" for name in Recipe.model_fields)
    if root is None:
        raise RecipeError([Problem(f"{shown}:1:1", "the recipe is empty", f"it needs sections: {sections}")])
    raise RecipeError([Problem(root.place.text, f"expected sections ({sections}), got {got(root)}", "is it a recipe?")])


@dataclass
class _Draft:
    """A recipe on its way from the tree to the typed one; findings gather here."""

    root: Table
    folder: Path
    methods: Mapping[str, MethodSchema]
    unset: Mapping[nodes.Path, Place]
    findings: list[Finding]
    method: str = ""
    schema: MethodSchema | None = None
    models: dict[str, type[BaseModel]] = field(default_factory=dict)
    parts: dict[str, BaseModel] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def finish(self) -> Recipe:
        """Run every check, then raise what was found or return the recipe."""
        self._choose_method()
        self._check_sections()
        self._drop_nulls()
        explicit = frozenset(f"{section}.{key}" for section, key in self._keys())
        self._imply(explicit)
        self._validate()
        view = rules.View(self.root, self.values, explicit)
        self.findings += rules.conflicts(view)
        if self.schema:
            self.findings += rules.unread_by_method(view, self.method, self.schema.unread)
        resolved = self._resolve_paths()
        nodes.raise_findings(self.findings)
        for section, update in resolved.items():
            if not update:  # a section that the recipe leaves out has nothing to resolve
                continue
            self.parts[section] = self.parts[section].model_copy(update=update)
        return Recipe.model_validate(self.parts)

    def _choose_method(self) -> None:
        """Find the models of all sections; the method's only where its name is known."""
        for name, info in Recipe.model_fields.items():
            if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
                self.models[name] = info.annotation
        path: nodes.Path = ("method", "name")
        node, place = find(self.root, path), key_place(self.root, path)
        if isinstance(node, Scalar) and isinstance(node.value, str) and node.value in self.methods:
            self.method, self.schema = node.value, self.methods[node.value]
            self.models["method"] = self.schema.config
        elif node is None or (isinstance(node, Scalar) and node.value is None):
            if _may_be_section(find(self.root, ("method",))):
                hint = did_you_mean("", self.methods)
                self._report(self.unset.get(path, place), "method.name: required key is missing", hint)
        elif not isinstance(node, Scalar):
            self._report(node.place, f"method.name: expected a method's name, got {got(node)}")
        elif not nodes.is_reported(node):
            name = node.raw or str(node.value)
            self._report(node.place, f"method.name: unknown method '{name}'", did_you_mean(name, self.methods))

    def _context(self) -> problems.Context:
        homes: dict[str, list[str]] = {}
        for section, model in self.models.items():
            for key in model.model_fields:
                homes.setdefault(key, []).append(f"`{section}`")
        return problems.Context(self.root, self.unset, {key: " or ".join(found) for key, found in homes.items()})

    def _check_sections(self) -> None:
        """Report unknown, missing and ill-typed sections; `models` keeps those that can be validated."""
        context = self._context()
        for name, entry in self.root.entries.items():
            node = entry.node
            if name not in Recipe.model_fields:
                self.findings.append(problems.unknown_key((name,), Recipe.model_fields, context))
            elif isinstance(node, Scalar) and node.value is None:
                self.root = nodes.put(self.root, (name,), Entry(entry.place, Table({}, node.place)))
            elif not isinstance(node, Table):
                self.models.pop(name, None)
                if not nodes.is_reported(node):
                    named = name in ("method", "backend") and isinstance(node, Scalar)
                    hint = f"write `name: {plain(node)}`" if named else "write its keys"
                    hint += f", indented, below `{name}:`"
                    self._report(node.place, f"{name}: expected a section, got {got(node)}", hint)
        for name, info in Recipe.model_fields.items():
            if info.is_required() and name not in self.root.entries:
                self.models.pop(name, None)
                place = self.unset.get((name,), self.root.place)
                self._report(place, f"{name}: required section is missing", f"add `{name}:`")

    def _keys(self) -> Iterator[tuple[str, str]]:
        """Yield (section, key) of every key that is set to something."""
        for section, entry in self.root.entries.items():
            for key, below in entry.node.entries.items() if isinstance(entry.node, Table) else ():
                if not (isinstance(below.node, Scalar) and below.node.value is None):
                    yield section, key

    def _drop_nulls(self) -> None:
        """Remove nulls that say no more than silence: those that unset, and those that are the default."""
        for section, model in self.models.items():
            table = find(self.root, (section,))
            for key, entry in table.entries.items() if isinstance(table, Table) else ():
                info = model.model_fields.get(key)
                if info is None or not isinstance(entry.node, Scalar) or entry.node.value is not None:
                    continue
                implied = self.schema is not None and f"{section}.{key}" in self.schema.defaults
                is_default = not info.is_required() and _default(info) is None and not implied
                if is_default or (section, key) in self.unset:
                    self.root = nodes.drop(self.root, (section, key))

    def _imply(self, explicit: frozenset[str]) -> None:
        """Put what the method implies where the recipe is silent, also about the key's rival."""
        place = key_place(self.root, ("method", "name"))
        for dotted, value in self.schema.defaults.items() if self.schema else ():
            path = tuple(dotted.split("."))
            assert path[0] in Recipe.model_fields, f"method '{self.method}' implies {dotted}, which is no key"
            rivals = {".".join(key) for pair in RIVALS if path in pair for key in pair}
            if path[0] in self.models and find(self.root, path) is None and not rivals & explicit:
                self.root = nodes.put(self.root, path, Entry(place, nodes.wrap(value, place)))

    def _validate(self) -> None:
        """Validate every section; gather valid values for the rules, also from sections with errors."""
        context = self._context()
        for section, model in self.models.items():
            data: Mapping[str, Any] = {}
            bad: set[Any] = set()
            if section in self.root.entries:
                checked = problems.validate(model, self.root, section)
                self.findings += problems.describe(model, checked.errors, context)
                data, bad = checked.data, {path[1] for path in checked.errors if len(path) > 1}
                if checked.instance is not None:
                    self.parts[section] = checked.instance
            for key, field_info in model.model_fields.items():
                if key not in bad and (key in data or not field_info.is_required()):
                    self.values[f"{section}.{key}"] = data.get(key, _default(field_info))

    def _resolve_paths(self) -> dict[str, dict[str, Any]]:
        """Return the resolved values to put in place, by section."""
        resolved: dict[str, dict[str, Any]] = {"data": {}, "model": {}, "method": {}, "backend": {}}
        if "train.output_dir" in self.values:
            self._try(("train", "output_dir"), paths.check_output_dir, self.values["train.output_dir"])
        for section, key, resolve in (
            ("model", "name_or_path", paths.resolve_model),
            ("method", "init_from", paths.resolve_adapter),
            ("backend", "config", paths.resolve_config),
        ):
            value = self.values.get(f"{section}.{key}")
            if value is not None:
                resolved[section][key] = self._try((section, key), resolve, value, self.folder)
        for key in RUNS + RUN:
            if runs := self.values.get(f"method.{key}"):
                found = paths.resolve_runs(runs, self.folder)
                resolved["method"][key] = found[0] if key in RUN else found
        if adapters := self.values.get("model.adapters"):
            resolved["model"]["adapters"] = [
                self._try(("model", "adapters", i), paths.resolve_adapter, value, self.folder)
                for i, value in enumerate(adapters)
            ]
        resolved["data"] |= self._resolve_data()
        return resolved

    def _resolve_data(self) -> dict[str, Any]:
        """Return `train`, `sources` and `eval` with absolute files, and report held-out files that are trained on."""
        resolved: dict[str, Any] = {}
        files = {}
        for key in ("train", "eval"):
            if self.values.get(f"data.{key}") is not None:
                files[key] = self._files(("data", key), self.values[f"data.{key}"])
                resolved[key] = _one_or_all(files[key])
        trained = files.get("train", [])
        if self.values.get("data.sources") is not None and "data" in self.parts:
            resolved["sources"] = []
            for i, source in enumerate(self.parts["data"].sources):  # type: ignore[attr-defined]
                found = self._files(("data", "sources", i, "path"), source.path)
                resolved["sources"].append(source.model_copy(update={"path": _one_or_all(found)}))
                self._refuse_leak(i, found, {os.path.realpath(name) for name, _ in trained})
                trained = trained + found
        trained_on = {os.path.realpath(name) for name, _ in trained if os.path.isabs(name)}
        for name, place in files.get("eval", ()):
            if os.path.realpath(name) in trained_on:
                message = f"data.eval: {os.path.basename(name)} is a training file too"
                self._report(place, message, "hold out other rows, or use data.eval_fraction")
        return resolved

    def _refuse_leak(self, index: int, files: list[tuple[str, Place]], earlier: set[str]) -> None:
        """Report files that an earlier source has too: a row held out of one would be trained on in the other."""
        for name, place in files if self.values.get("data.eval_fraction") else ():
            if os.path.realpath(name) in earlier:
                message = f"data.sources[{index}].path: {os.path.basename(name)} is in an earlier source too"
                hint = "so data.eval_fraction would hold out rows that are trained on: name data.eval, or remove it"
                self._report(place, message, hint)

    def _files(self, key: nodes.Path, value: str | list[str]) -> list[tuple[str, Place]]:
        """Return the files of a key of `data:` (or one hub id), each with the place of its entry."""
        entries = value if isinstance(value, list) else [value]
        if not entries:
            message = f"{nodes.dotted(key)}: expected at least one file, got an empty list"
            self._report(self._value_place(key), message)
        found: list[tuple[str, Place]] = []
        for index, entry in enumerate(entries):
            path: nodes.Path = (*key, index) if isinstance(value, list) else key
            place = self._value_place(path)
            resolved = self._try(path, paths.resolve_data, entry, self.folder)
            if isinstance(resolved, str) and len(entries) > 1:
                message = f"{nodes.dotted(path)}: '{resolved}' is no file, and a hub id stands alone"
                self._report(place, message, "correct the path, or write the hub id without a list")
            found += [(name, place) for name in ([resolved] if isinstance(resolved, str) else resolved or ())]
        return found

    def _value_place(self, path: nodes.Path) -> Place:
        node = find(self.root, path)
        return node.place if node else key_place(self.root, path)

    def _try(self, path: nodes.Path, resolve: Callable[..., Any], *arguments: Any) -> Any:
        """Return what `resolve` returns; where it fails, note why, at the value of the path."""
        try:
            return resolve(*arguments)
        except paths.Unresolved as error:
            self._report(self._value_place(path), f"{nodes.dotted(path)}: {error.message}", error.hint)
            return None

    def _report(self, place: Place, message: str, hint: str = "") -> None:
        self.findings.append(Finding(place, message, hint))


def _one_or_all(found: list[tuple[str, Place]]) -> str | list[str]:
    names = [name for name, _ in found]
    return names[0] if len(names) == 1 else names


def _may_be_section(node: nodes.Node | None) -> bool:
    return isinstance(node, Table) or (isinstance(node, Scalar) and node.value is None)


def _default(info: FieldInfo) -> Any:
    return info.get_default(call_default_factory=True)
