"""The part of Go's text/template that Ollama templates need, so that one can be rendered here and compared.

Known: text, `{{ VALUE }}`, `{{ if }} {{ else if }} {{ else }} {{ end }}`, `{{ range $i, $m := .Messages }}`, fields of
the root and of a message, quoted text, whole numbers, and the functions eq, and, len and slice. All else is refused.
Semantics: https://pkg.go.dev/text/template; what Ollama puts in: https://docs.ollama.com/template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, str]
_ACTION = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_TOKEN = re.compile(
    r'\s*(?:(?P<text>"[^"\\]*")|(?P<number>\d+)|(?P<path>\$\w*(?:\.\w+)*|\.\w+)|(?P<word>\w+)|(?P<mark>[()]))'
)
_RANGE = re.compile(r"range (?:\$(?P<index>\w+), \$(?P<item>\w+) := )?(?P<over>\.Messages)")
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda a, b: a == b,
    "and": lambda a, b: b if a else a,
    "len": len,
    "slice": lambda items, first: items[first:],
}
_FIELDS = {"System", "Messages", "Role", "Content"}


@dataclass(frozen=True)
class _Text:
    text: str

    def write(self, scope: Mapping[str, Any]) -> str:
        return self.text


@dataclass(frozen=True)
class _Value:
    expression: Callable[[Mapping[str, Any]], Any]

    def write(self, scope: Mapping[str, Any]) -> str:
        return str(self.expression(scope))


@dataclass(frozen=True)
class _If:
    condition: Callable[[Mapping[str, Any]], Any]
    then: Sequence[Any]
    otherwise: Sequence[Any]

    def write(self, scope: Mapping[str, Any]) -> str:
        return _written(self.then if self.condition(scope) else self.otherwise, scope)


@dataclass(frozen=True)
class _Range:
    index: str
    item: str
    body: Sequence[Any]

    def write(self, scope: Mapping[str, Any]) -> str:
        """Write the body for each message; the dot is the message, as in Go."""
        messages = scope["."]["Messages"]
        return "".join(
            _written(self.body, {**scope, ".": message, f"${self.index}": i, f"${self.item}": message})
            for i, message in enumerate(messages)
        )


class Template:
    """A parsed template.

    Args:
        text: As it stands behind TEMPLATE in a Modelfile.

    Raises:
        ValueError: It uses something that is not known here.
    """

    def __init__(self, text: str):
        self.text = text
        pieces = _split(text)
        self._nodes, end = _parse(pieces)
        if end is not None:
            raise ValueError(f"{{{{ {end} }}}} without an if or range before it")

    def render(self, messages: Sequence[Message], system: str = "") -> str:
        """Return what Ollama gives the model for a conversation.

        Args:
            messages: `role` and `content` of each.
            system: SYSTEM of the Modelfile; stands in front of a conversation that has no system message.
        """
        opening = [{"role": "system", "content": system}] if system and messages[0]["role"] != "system" else []
        found = [{"Role": m["role"], "Content": m["content"]} for m in (*opening, *messages)]
        systems = [m["Content"] for m in found if m["Role"] == "system"]
        root = {"System": "\n\n".join(systems), "Messages": found}
        return _written(self._nodes, {".": root, "$": root})


def _written(nodes: Sequence[Any], scope: Mapping[str, Any]) -> str:
    return "".join(node.write(scope) for node in nodes)


def _split(text: str) -> Iterator[tuple[str, str]]:
    """Yield ("text" or "action", content)."""
    for i, piece in enumerate(_ACTION.split(text)):
        if i % 2:
            if piece != f" {piece.strip()} ":
                raise ValueError(f"{{{{{piece}}}}}: expected one space inside the braces, and no trimming")
            yield "action", piece.strip()
        elif "{{" in piece or "}}" in piece:
            raise ValueError("braces that do not match")
        elif piece:
            yield "text", piece


def _parse(pieces: Iterator[tuple[str, str]]) -> tuple[list[Any], str | None]:
    """Return the nodes up to the `end` or `else` of this level, and that action."""
    nodes: list[Any] = []
    for kind, content in pieces:
        if kind == "text":
            nodes.append(_Text(content))
        elif content == "end" or content.startswith("else"):
            return nodes, content
        elif content.startswith("if "):
            nodes.append(_parse_if(content, pieces))
        elif content.startswith("range "):
            nodes.append(_parse_range(content, pieces))
        else:
            nodes.append(_Value(_expression(content)))
    return nodes, None


def _parse_if(content: str, pieces: Iterator[tuple[str, str]]) -> _If:
    then, end = _parse(pieces)
    otherwise: list[Any] = []
    if end == "else":
        otherwise, end = _parse(pieces)
    elif end is not None and end.startswith("else if "):
        otherwise, end = [_parse_if(end.removeprefix("else "), pieces)], "end"
    if end != "end":
        raise ValueError(f"{{{{ {content} }}}}: expected {{{{ end }}}}, got {end or 'the end of the text'}")
    return _If(_expression(content.removeprefix("if ")), then, otherwise)


def _parse_range(content: str, pieces: Iterator[tuple[str, str]]) -> _Range:
    found = _RANGE.fullmatch(content)
    body, end = _parse(pieces)
    if found is None or end != "end":
        raise ValueError(f"{{{{ {content} }}}}: only a range over .Messages that ends with {{{{ end }}}} is known")
    return _Range(found["index"] or "", found["item"] or "", body)


def _expression(text: str) -> Callable[[Mapping[str, Any]], Any]:
    tokens, position = [], 0
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None:
            raise ValueError(f"{{{{ {text} }}}}: not known here")
        tokens.append((str(found.lastgroup), found[str(found.lastgroup)]))
        position = found.end()
    value, rest = _operand(tokens) if tokens[0][0] != "word" else _call(tokens)
    if rest:
        raise ValueError(f"{{{{ {text} }}}}: not known here")
    return value


def _call(tokens: list[tuple[str, str]]) -> tuple[Callable[[Mapping[str, Any]], Any], list[tuple[str, str]]]:
    """Parse a function with its operands, up to a closing parenthesis or the end."""
    name, rest = tokens[0][1], tokens[1:]
    if name not in _FUNCTIONS:
        raise ValueError(f"{name}: not a function that is known here")
    operands = []
    while rest and rest[0] != ("mark", ")"):
        operand, rest = _operand(rest)
        operands.append(operand)
    return lambda scope: _FUNCTIONS[name](*(operand(scope) for operand in operands)), rest


def _operand(tokens: list[tuple[str, str]]) -> tuple[Callable[[Mapping[str, Any]], Any], list[tuple[str, str]]]:
    kind, token = tokens[0]
    rest = tokens[1:]
    if kind == "text":
        return lambda scope: token[1:-1], rest
    if kind == "number":
        return lambda scope: int(token), rest
    if kind == "path":
        root, *names = token.split(".")
        if not set(names) <= _FIELDS:
            raise ValueError(f"{token}: not a field that is known here")
        return lambda scope: _follow(scope[root or "."], names), rest
    if (kind, token) == ("mark", "("):
        value, rest = _call(rest)
        if rest[:1] == [("mark", ")")]:
            return value, rest[1:]
    raise ValueError(f"{token}: not known here")


def _follow(value: Any, names: Sequence[str]) -> Any:
    for name in names:
        value = value[name]
    return value
