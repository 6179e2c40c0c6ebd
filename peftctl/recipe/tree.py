"""YAML as a tree in which every key and value knows its place.

The scalars are those of YAML 1.2's core schema, in decimal: `2e-5` is a float, only true and false are booleans, and
`007`, `0x10`, `1_000`, `yes` are text. `${NAME}` and `${NAME:-default}` in a text are read from the environment.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from peftctl.errors import Problem, RecipeError
from peftctl.recipe.nodes import BROKEN, Entry, Finding, Items, Node, Place, Scalar, Table

MAX_DEPTH = 32
MAX_VALUES = 10_000

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_WORDS |= {f"{sign}.{word}": float(f"{sign}inf") for sign in ("", "+", "-") for word in ("inf", "Inf", "INF")}
_WORDS |= {word: float("nan") for word in (".nan", ".NaN", ".NAN")}

_VARIABLE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}|\$\{")

# PyYAML's words for a mistake, ours, what to do, and whether the beginning of the construct is the better place.
_SYNTAX = (
    ("found character '\\t'", "a tab", "indent with spaces", False),
    ("mapping values are not allowed", "a ':' that does not belong here", "indent it right, or quote the text", False),
    ("could not find expected ':'", "a key without ':'", "write `key: value`", True),
    ("expected <block end>", "text that fits no line above", "check the indentation and the quotes", False),
    ("expected ',' or ']'", "a list that is not closed", "add ']', or quote texts that hold [ ] { } or ,", True),
    ("expected ',' or '}'", "a mapping that is not closed", "add '}', or quote texts that hold [ ] { } or ,", True),
    ("unexpected end of stream", "a quote that is not closed", "close the quote", True),
    ("expected '<document start>'", "text that fits no line above", "check the indentation and the quotes", False),
    ("expected the node content", "a sign where a value should stand", "quote the text", False),
    ("mapping keys are not allowed", "a '?' that begins no key", "quote the text", False),
    ("sequence entries are not allowed", "a '-' that begins no list element", "put lists below their key", False),
    ("expected escape sequence", "an unknown escape in double quotes", "use single quotes", False),
    (
        "expected chomping or indentation",
        "text behind '|' or '>'",
        "quote the text, or begin it on the next line",
        False,
    ),
    (
        "expected a comment or a line break",
        "text behind '|' or '>'",
        "quote the text, or begin it on the next line",
        False,
    ),
    ("expected alphabetic or numeric", "a '*' or '&' without a name", "quote the text", False),
    ("unknown escape character", "an unknown escape in double quotes", "use single quotes", False),
    ("cannot start any token", "a character that can't begin a value", "quote the text", False),
)


def resolve_scalar(text: str) -> Any:
    """Return the value of a plain scalar: None, a boolean, an int, a float, or the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def substitute(text: str) -> str:
    """Return the text with `${NAME}` read from the environment; `$${` stands for `${`.

    Raises:
        ValueError: A variable is unset, or a `${` is not closed; the message says which.
    """

    def value(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        if match[0] == "$${":
            return "${"
        if name is None:
            raise ValueError("'${' without a variable's name and '}'; write ${NAME}, or $${ for the two characters")
        found = os.environ.get(name, "")
        if default is not None:
            return found or default
        if name not in os.environ:
            raise ValueError(f"environment variable {name} is not set; set it, or write ${{{name}:-default}}")
        return found

    return _VARIABLE.sub(value, text)


def scalar(text: str, place: Place, *, quoted: bool, raw: str | None, findings: list[Finding]) -> Scalar:
    """Return the node of a scalar's text, with variables read; what can't be read goes to `findings`."""
    if not _is_text(text):
        findings.append(Finding(place, "a character that no text may hold (NUL or half a surrogate pair)", "remove it"))
        return Scalar(BROKEN, place)
    try:
        read = substitute(text)
    except ValueError as error:
        message, _, hint = str(error).partition("; ")
        findings.append(Finding(place, message, hint))
        return Scalar(BROKEN, place)
    whole = _VARIABLE.fullmatch(text) is not None and text != "$${"
    if quoted or (read != text and not whole):
        return Scalar(read, place, quoted=quoted, raw=raw)
    return Scalar(resolve_scalar(read), place, raw=read if whole else raw)


def parse(text: str, file: str = "", place: Place | None = None) -> tuple[Node | None, list[Finding]]:
    """Parse YAML.

    Args:
        text: One YAML document.
        file: Its name in places.
        place: Where everything in it stands, for a text that comes from no file; plain scalars then keep their `raw`.

    Returns:
        The root, None where there is no content, and what is wrong with single keys or values.

    Raises:
        RecipeError: The text is no YAML, or holds more than a recipe may.
    """
    return _Builder(text, file, place).document()


@dataclass
class _Builder:
    """Builds the tree from PyYAML's events: they carry marks, and nothing of Python can be constructed from them."""

    text: str
    file: str
    fixed_place: Place | None
    findings: list[Finding] = field(default_factory=list)
    anchors: dict[str, tuple[Node, int]] = field(default_factory=dict)
    open_anchors: set[str] = field(default_factory=set)
    values: int = 0

    def document(self) -> tuple[Node | None, list[Finding]]:
        try:
            loader = yaml.BaseLoader(self.text)
        except yaml.reader.ReaderError as error:
            before = self.text[: error.position]
            line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
            place = self.fixed_place or Place.in_file(self.file, line, column)
            self._fail(place, f"a control character (code {error.character}) in the text", "remove it")
        try:
            return self._document(loader), self.findings
        except yaml.MarkedYAMLError as error:
            mark, message, hint = _explain(error)
            self._fail(self._place(mark), f"not YAML: {message}", hint)
        except (ValueError, OverflowError):  # PyYAML on an escape beyond Unicode
            self._fail(
                self._place(loader.get_mark()), "not YAML: found an escape that is no character", "use single quotes"
            )

    def _document(self, loader: yaml.BaseLoader) -> Node | None:
        loader.get_event()
        if loader.check_event(yaml.StreamEndEvent):
            return None
        loader.get_event()
        root = self._node(loader, 0)
        loader.get_event()
        if not loader.check_event(yaml.StreamEndEvent):
            place = self._place(loader.peek_event().start_mark)
            self._fail(place, "a second document", "a recipe is one document; remove '---' and what follows")
        return None if isinstance(root, Scalar) and root.value is None else root

    def _node(self, loader: yaml.BaseLoader, depth: int) -> Node:
        event = loader.get_event()
        place = self._place(event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(str(event.anchor), place)
        self._count(1, place)
        if depth > MAX_DEPTH:
            self._fail(place, f"nested deeper than {MAX_DEPTH} levels", "a recipe needs three")
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self.findings.append(Finding(place, f"YAML tag '{tag}'", "recipes use no tags; remove it"))
        before = self.values
        if event.anchor:
            self.open_anchors.add(event.anchor)
        node = self._content(loader, event, place, depth)
        if event.anchor:
            self.open_anchors.discard(event.anchor)
            self.anchors[event.anchor] = node, self.values - before + 1
        return node

    def _content(self, loader: yaml.BaseLoader, event: Any, place: Place, depth: int) -> Node:
        if isinstance(event, yaml.ScalarEvent):
            quoted = bool(event.style)
            raw = event.value if self.fixed_place and not quoted else None
            return scalar(event.value, place, quoted=quoted, raw=raw, findings=self.findings)
        if isinstance(event, yaml.SequenceStartEvent):
            nodes = []
            while not loader.check_event(yaml.SequenceEndEvent):
                nodes.append(self._node(loader, depth + 1))
            loader.get_event()
            return Items(tuple(nodes), place)
        entries: dict[str, Entry] = {}
        while not loader.check_event(yaml.MappingEndEvent):
            self._entry(loader, entries, depth)
        loader.get_event()
        return Table(entries, place)

    def _entry(self, loader: yaml.BaseLoader, entries: dict[str, Entry], depth: int) -> None:
        event = loader.peek_event()
        place = self._place(event.start_mark)
        if not isinstance(event, yaml.ScalarEvent) or event.tag is not None or not _is_text(event.value):
            self._fail(place, "a key that is not plain text", "write `key: value`")
        loader.get_event()
        node = self._node(loader, depth + 1)
        key, written_plain = event.value, not event.style
        if written_plain and key == "<<":
            self.findings.append(Finding(place, "merge key '<<'", "recipes have none; write the keys out"))
        elif written_plain and not key:
            self.findings.append(Finding(place, "a ':' without a key before it", "write `key: value`"))
        elif key in entries:
            first = entries[key].place
            message = f"key '{key}' is set twice, first at {first.text}"
            self.findings.append(Finding(place, message, "remove one of the two"))
        else:
            entries[key] = Entry(place, node)

    def _alias(self, name: str, place: Place) -> Node:
        if name in self.open_anchors:
            self._fail(place, f"alias '*{name}' stands inside its own anchor", "write the value out")
        if name not in self.anchors:
            self._fail(place, f"alias '*{name}' has no anchor '&{name}' above it", "write the value out")
        node, values = self.anchors[name]
        self._count(values, place)
        return node

    def _count(self, values: int, place: Place) -> None:
        self.values += values
        if self.values > MAX_VALUES:
            self._fail(place, f"more than {MAX_VALUES} values (aliases counted out)", "a recipe has about fifty")

    def _place(self, mark: Any) -> Place:
        return self.fixed_place or Place.in_file(self.file, mark.line + 1, mark.column + 1)

    def _fail(self, place: Place, message: str, hint: str) -> NoReturn:
        raise RecipeError([Problem(place.text, message, hint)]) from None


def _is_text(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _explain(error: yaml.MarkedYAMLError) -> tuple[Any, str, str]:
    """Return the mark, the message and the hint of a syntax error."""
    problem, mark = str(error.problem), error.problem_mark or error.context_mark
    for fragment, message, hint, at_begin in _SYNTAX:
        if fragment in problem:
            return (error.context_mark if at_begin else None) or mark, f"found {message}", hint
    return mark, problem, "check the line and the one above it"
