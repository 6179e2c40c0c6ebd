"""Values of requests: how each is said, and what it is in the call.

A value of the evaluation split never occurs in the training split: names and things by disjoint pools, dates, times,
amounts and counts by arithmetic on the value, whatever way it is said.
"""

from __future__ import annotations

import calendar
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from demo_data import pools
from demo_data.pools import Pool, Split

MONTHS = list(calendar.month_name)
_UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


@dataclass(frozen=True)
class Value:
    """One value.

    Args:
        pieces: Text as it is said, cut where the value begins and ends: (text, belongs to the value).
        leaf: What stands in the call.
        plain: How the sentences of the text-to-text set say it.
    """

    pieces: tuple[tuple[str, bool], ...]
    leaf: str | int | list[str]
    plain: str


def _said(text: str, leaf: str | int, plain: str | None = None) -> Value:
    return Value(((text, True),), leaf, str(leaf) if plain is None else plain)


def words(number: int) -> str:
    """Return a number from 0 to 99 in words."""
    if number < 20:
        return _UNITS[number]
    tens, unit = divmod(number, 10)
    return _TENS[tens] + (f"-{_UNITS[unit]}" if unit else "")


def _in_split(code: int, split: Split) -> bool:
    return (code % 5 == 0) == (split == "eval")


def _ordinal(day: int) -> str:
    ending = "th" if 11 <= day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


def date(rng: Random, split: Split) -> Value:
    """Return a day of the year; in the call it is MM-DD."""
    while True:
        month, day = rng.randint(1, 12), rng.randint(1, 31)
        if day <= calendar.monthrange(2023, month)[1] and _in_split(day + 2 * month, split):
            break
    name = MONTHS[month]
    forms = (f"{day} {name}", f"{name} {day}", f"{name} {_ordinal(day)}", f"the {_ordinal(day)} of {name}")
    return _said(rng.choice(forms), f"{month:02d}-{day:02d}", f"{day} {name}")


def _part_of_day(hour: int) -> str:
    return "morning" if hour < 12 else "afternoon" if hour < 18 else "evening"


def time(rng: Random, split: Split) -> Value:
    """Return a time of day; in the call it is in digits, of 24 hours or with am and pm as it was said."""
    while True:
        hour, minute = rng.randint(7, 21), rng.choice((0, 10, 15, 20, 30, 40, 45, 50))
        if _in_split(hour + minute // 5, split):
            break
    clock = (hour - 1) % 12 + 1
    digits = f"{clock}:{minute:02d}" if minute else f"{clock}"
    twelve = f"{digits} {'am' if hour < 12 else 'pm'}"
    spoken = {0: "{}", 30: "half past {}"}.get(minute)
    if spoken and rng.random() < 0.25:
        return _said(f"{spoken.format(words(clock))} in the {_part_of_day(hour)}", twelve)
    said = rng.choice((f"{hour:02d}:{minute:02d}", twelve, twelve))
    return _said(said, said)


def amount(rng: Random, split: Split) -> Value:
    """Return an amount of money; in the call it has two decimals and the currency's code."""
    while True:
        whole, cents = rng.randint(3, 95), rng.choice((0, 0, 50, 25, 75, 20, 80))
        if _in_split(whole + cents // 5, split):
            break
    sign, name, code = rng.choice((("€", "euros", "EUR"), ("$", "dollars", "USD"), ("£", "pounds", "GBP")))
    digits = f"{whole}.{cents:02d}" if cents else f"{whole}"
    if not cents and rng.random() < 0.5:
        return _said(f"{words(whole)} {name}", f"{whole}.00 {code}")
    form = rng.choice((f"{sign}{digits}", f"{digits} {name}"))
    return _said(form, f"{whole}.{cents:02d} {code}")


def count(rng: Random, split: Split) -> Value:
    """Return how many people or things."""
    number = rng.choice((2, 3, 4, 5, 6, 8, 10, 12) if split == "train" else (7, 9, 11))
    return _said(rng.choice((str(number), words(number))), number)


Maker = Callable[[Random, Split], Value]


def pooled(*parts: Pool, prefix: str = "") -> Maker:
    """Return a maker of values with one word of each pool."""

    def make(rng: Random, split: Split) -> Value:
        text = prefix + " ".join(rng.choice(part[split]) for part in parts)
        return _said(text, text)

    return make


def several(pool: Pool, joiner: str, most: int = 2) -> Maker:
    """Return a maker of lists of one to `most` words."""

    def make(rng: Random, split: Split) -> Value:
        chosen = rng.sample(pool[split], rng.choice(range(1, most + 1)))
        pieces: list[tuple[str, bool]] = []
        for word in chosen:
            pieces += [(f" {joiner} ", False)] * bool(pieces) + [(word, True)]
        return Value(tuple(pieces), chosen, f" {joiner} ".join(chosen))

    return make


def person(rng: Random, split: Split) -> Value:
    """Return a first name, mostly with a last name."""
    full = rng.random() < 0.7
    name = rng.choice(pools.FIRST_NAMES[split]) + (f" {rng.choice(pools.LAST_NAMES[split])}" if full else "")
    return _said(name, name)


def other_person(rng: Random, split: Split) -> Value:
    """Return a person as a list, for those whom a request leaves out."""
    value = person(rng, split)
    return Value(value.pieces, [value.plain], value.plain)
