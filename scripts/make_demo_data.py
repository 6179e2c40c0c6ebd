"""Write the demo data of recipes/data/: `python scripts/make_demo_data.py [FOLDER]`.

Everything is made here from a fixed seed: the same files every time, on every machine. A fifth of the evaluation
requests is phrased in ways that no training row uses, and no value of an evaluation row (name, place, thing, date,
time, amount, count) occurs in the training rows of its set.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from demo_data.phrasings import INTENTS, TAGS
from demo_data.pools import Split
from demo_data.requests import Request, make_request, note, sentence
from demo_data.tasks import alpaca_row, belle_row, preference_row

SEED = 20260101
HOME = Path(__file__).resolve().parent.parent / "recipes" / "data"
Row = dict[str, Any]


def compact(call: Row) -> str:
    """Return a call as JSON without spaces: the one right answer, so that exact match is a fair measure."""
    return json.dumps(call, ensure_ascii=False, separators=(",", ":"))


def requests(name: str, split: Split, rows: int) -> Iterator[Request]:
    """Yield requests that differ in text and in call, the intents in turn; one of five evaluation rows is unseen."""
    rng = Random(f"{SEED} {name} {split}")
    known: set[str] = set()
    for number in range(rows):
        intent, unseen = INTENTS[number % len(INTENTS)], split == "eval" and number % 5 == 4
        request = make_request(rng, intent, split, unseen)
        while request.text in known or compact(request.call) in known:
            request = make_request(rng, intent, split, unseen)
        known |= {request.text, compact(request.call)}
        yield request


def messages_row(request: Request) -> Row:
    """Return a request and its call as a chat of two turns."""
    turns = (("user", request.text), ("assistant", compact(request.call)))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def intent_row(request: Request) -> Row:
    """Return a request and what it is about."""
    return {"text": request.text, "label": request.intent.call}


def slots_row(request: Request) -> Row:
    """Return a request as words with BIO tags of its values."""
    tokens: list[str] = []
    tags: list[str] = []
    for text, name in request.pieces:
        found = re.findall(r"\w+(?:['’.:-]\w+)*|[^\w\s]", text)
        tokens += found
        tags += [f"{'I' if place else 'B'}-{TAGS[name]}" if name else "O" for place in range(len(found))]
    return {"tokens": tokens, "tags": tags}


def rewrite_row(request: Request) -> Row:
    """Return a terse note of a request and the sentence it stands for."""
    return {"prompt": note(request), "completion": sentence(request)}


SETS: dict[str, tuple[Callable[[Request], Row], int, int]] = {
    "requests": (messages_row, 1600, 240),
    "intents": (intent_row, 490, 140),
    "slots": (slots_row, 350, 105),
    "rewrite": (rewrite_row, 490, 105),
    "alpaca": (alpaca_row, 210, 35),
    "belle": (belle_row, 210, 35),
    "preferences": (preference_row, 210, 35),
}


def write(folder: Path) -> None:
    """Write every set into `folder` as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (row, train, evaluation) in SETS.items():
        for split, count in (("train", train), ("eval", evaluation)):
            lines = [json.dumps(row(r), ensure_ascii=False) + "\n" for r in requests(name, split, count)]  # type: ignore[arg-type]
            (folder / f"{name}_{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=HOME, help="where to write; left out, recipes/data/")
    write(parser.parse_args().folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
