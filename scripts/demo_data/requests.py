"""One request: its text in pieces, the call it means, and which phrasing it used."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from string import Formatter
from typing import Any

from demo_data.phrasings import (
    COMMAND_CLOSERS,
    COMMAND_OPENERS,
    STATEMENT_CLOSERS,
    STATEMENT_OPENERS,
    Intent,
)
from demo_data.pools import Split
from demo_data.values import Value

QUESTION_WORDS = {"what", "will", "how", "do", "is"}
Piece = tuple[str, str | None]  # text, name of the value it is


@dataclass(frozen=True)
class Request:
    """A request with its answer.

    Args:
        intent: What kind it is.
        core: The core phrasing, as written in phrasings.py.
        pieces: The text, cut at the values.
        said: The values that the text says.
    """

    intent: Intent
    core: str
    pieces: tuple[Piece, ...]
    said: Mapping[str, Value]

    @property
    def text(self) -> str:
        """The request as a user would write it."""
        return "".join(text for text, _ in self.pieces)

    @property
    def call(self) -> dict[str, Any]:
        """The answer: the intent's shape with the values that were said."""
        return {**_filled(self.intent.shape, self.said), "call": self.intent.call}


def _filled(shape: Mapping[str, Any], said: Mapping[str, Value]) -> dict[str, Any]:
    return {
        key: _filled(name, said) if isinstance(name, Mapping) else said[name].leaf if name in said else None
        for key, name in shape.items()
    }


def names_in(template: str) -> list[str]:
    """Return the value names of a template."""
    return [name for _, name, _, _ in Formatter().parse(template) if name]


def _pieces(template: str, said: Mapping[str, Value]) -> list[Piece]:
    pieces: list[Piece] = []
    for text, name, _, _ in Formatter().parse(template):
        pieces += [(text, None)] * bool(text)
        if name:
            pieces += [(part, name if inside else None) for part, inside in said[name].pieces]
    return pieces


def _opening(rng: Random, statement: bool, front: str) -> str:
    """Return the words before the core, of which `front` (a date, or nothing) comes first."""
    if statement:
        return f"{front}, " if front else rng.choice(STATEMENT_OPENERS)
    opener = rng.choice(COMMAND_OPENERS)
    if not front:
        return opener
    return f"{front}, " + (opener if opener.startswith("I") else opener[:1].lower() + opener[1:])


def _closing(rng: Random, statement: bool, opening: str, sentences: list[str]) -> str:
    """Return the words and punctuation after the core and its details; `sentences` follow."""
    closer = rng.choice(STATEMENT_CLOSERS if statement else COMMAND_CLOSERS)
    if sentences or (closer == ", please" and "lease" in opening):
        closer = ""
    asks = re.search(r"\b(could|can|would) you\b", opening, re.IGNORECASE)
    end = "?" if asks else rng.choice((".", ".", ".", "!") if sentences else (".", ".", ".", "!", ""))
    return closer + end + "".join(f" {sentence[2:]}." for sentence in sentences)


def _template(rng: Random, intent: Intent, core: str) -> str:
    """Return the whole phrasing around `core`: opening, details in some order, closing."""
    statement = core in intent.statements
    details = [detail for detail in intent.details if rng.random() < detail.share]
    rng.shuffle(details)
    details.sort(key=lambda detail: detail.last)
    front = next((detail for detail in details if detail.front and rng.random() < 0.25), None)
    said = [rng.choice(detail.said) for detail in details if detail is not front]
    inline = [part if part.startswith(",") else f" {part}" for part in said if not part.startswith(".")]
    sentences = [part for part in said if part.startswith(".")]
    opening = _opening(rng, statement, front.said[0] if front else "")
    if statement and core.split()[0] in QUESTION_WORDS:
        return opening + core + "".join(inline) + "?" + "".join(f" {part[2:]}." for part in sentences)
    return opening + core + "".join(inline) + _closing(rng, statement, opening, sentences)


def make_request(rng: Random, intent: Intent, split: Split, unseen: bool = False) -> Request:
    """Make one request of an intent; `unseen` takes a core phrasing that training rows never use."""
    core = rng.choice(intent.unseen if unseen else intent.commands + intent.statements)
    template = _template(rng, intent, core)
    said = {name: intent.makers[name](rng, split) for name in dict.fromkeys(names_in(template))}
    pieces = _pieces(template, said)
    first, name = pieces[0]
    return Request(intent, core, ((first[0].upper() + first[1:], name), *pieces[1:]), said)


def note(request: Request) -> str:
    """Return the request as a terse note."""
    leaves = [(name, value.leaf) for name, value in sorted(request.said.items())]
    parts = [f"{name} {' + '.join(leaf) if isinstance(leaf, list) else leaf}" for name, leaf in leaves]
    return "; ".join([request.intent.call, *parts])


def sentence(request: Request) -> str:
    """Return the request in its intent's standard words."""
    return in_words(request, request.intent.sentence)


def in_words(request: Request, template: str) -> str:
    """Return the template with the request's values; a part in brackets is dropped when a value of it is missing."""
    plain = {name: value.plain for name, value in request.said.items()}

    def keep(part: re.Match[str]) -> str:
        return part[1] if all(name in plain for name in names_in(part[1])) else ""

    return re.sub(r"\[([^\]]*)\]", keep, template).format(**plain)
