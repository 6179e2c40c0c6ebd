"""Instruction-following rows and dialogues with a better and a worse answer, made from requests."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from zlib import crc32

from demo_data.requests import Request, in_words, note, sentence

Row = dict[str, str]

# What an assistant answers to a request; a part in brackets is dropped when a value of it is missing.
REPLIES = {
    "book": "Your table[ for {guests}] at {place} is booked[ on {date}][ at {time}].[ I asked for a seat away from {not}.] A confirmation comes by email.",
    "pay": "I have prepared a transfer of {amount} to {to}[ for {for}][, due on {date}]. Please confirm it in your banking app.",
    "remind": "Noted: I will remind you to {task}[ on {date}][ at {time}].",
    "order": "{count} {name}[ with {with}][ without {not}]: the kitchen has your order. It takes about half an hour.",
    "cancel": "The meeting with {who}[ on {date}][ at {time}] is cancelled, and I have sent a message.[ The one with {not} stays in your calendar.]",
    "play": "{title}[ by {by}] comes next.[ It starts at {time}.][ There will be no {not}.]",
    "weather": "I am looking up the forecast for {place}[ on {date}][ at {time}].[ I will leave out {not}.]",
}
# Answers that miss the point: short ones to anything, and one an intent that is wrong for every other intent.
CURT = ("No.", "I don't know.", "Try again later.", "That is not my job.", "Why do you ask?", "Maybe.")
BESIDE_THE_POINT = {
    "book": "You should cook at home more often.",
    "pay": "Money is not everything in life.",
    "remind": "A good memory is a matter of practice.",
    "order": "I have never been hungry myself.",
    "cancel": "Meetings are usually longer than they need to be.",
    "play": "There is a lot of music in the world.",
    "weather": "The climate differs from place to place.",
}
SERVICES = {
    "book": "table reservations",
    "pay": "payments",
    "remind": "reminders",
    "order": "food delivery",
    "cancel": "the calendar",
    "play": "music",
    "weather": "the weather service",
}


def reply(request: Request) -> str:
    """Return what a helpful assistant answers."""
    text = in_words(request, REPLIES[request.intent.call])
    return text[0].upper() + text[1:]


def _listed(request: Request) -> str:
    return "\n".join(f"{name}: {value.plain}" for name, value in sorted(request.said.items()))


def _service(request: Request) -> str:
    return f"This one is for {SERVICES[request.intent.call]}."


def _text(request: Request) -> str:
    return request.text


def _nothing(request: Request) -> str:
    return ""


Part = Callable[[Request], str]
# Phrasings of the instruction, the input that it is about, and the answer; {} stands for the request in standard words.
TASKS: tuple[tuple[tuple[str, ...], Part, Part], ...] = (
    (("Put this message into standard words.", "Rewrite the request as briefly as possible.", "Shorten this message."), _text, sentence),
    (("Answer this customer politely.", "Write the reply of an assistant.", "What would a helpful assistant answer?"), _text, reply),
    (("Turn the note into a sentence.", "Say what this note means.", "Write the note out."), note, sentence),
    (("List the details, one a line.", "Which facts does this message hold?", "Extract the details of the request."), _text, _listed),
    (("Which department is this message for?", "Who should take care of this?", "Route this message."), _text, _service),
    (("Write a message of a customer who wants this: {}", "How could somebody say this in a chat? {}"), _nothing, _text),
)  # fmt: skip


def _task(request: Request) -> tuple[str, str, str]:
    """Return (instruction, input, answer) of one of the tasks; the same one for the same request."""
    rng = Random(f"task {request.text}")
    phrasings, given, answer = rng.choice(TASKS)
    return rng.choice(phrasings).format(sentence(request)), given(request), answer(request)


def alpaca_row(request: Request) -> Row:
    """Return an instruction, what it is about (may be empty) and the answer."""
    return dict(zip(("instruction", "input", "output"), _task(request), strict=True))


def belle_row(request: Request) -> Row:
    """Return the same kind of task as one text, with an id."""
    instruction, given, answer = _task(request)
    return {
        "id": f"{request.intent.call}-{crc32(request.text.encode()):08x}",
        "input": f"{instruction}\n{given}" if given else instruction,
        "target": answer,
    }


def preference_row(request: Request) -> Row:
    """Return a dialogue up to the assistant's turn, with a good answer and a poor one."""
    rng = Random(f"preference {request.text}")
    elsewhere = [text for call, text in BESIDE_THE_POINT.items() if call != request.intent.call]
    return {
        "prompt": f"\n\nHuman: {request.text}\n\nAssistant:",
        "chosen": f" {reply(request)}",
        "rejected": f" {rng.choice((rng.choice(CURT), rng.choice(elsewhere), f'You said: {request.text}'))}",
    }
