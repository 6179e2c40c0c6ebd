"""How requests are phrased, intent by intent, and the call that each means.

A request is an opener, a core, optional details in any order, and a closer. `{name}` stands for a value; details are
set off by a space, but those that begin with a comma or, as sentences of their own, with a full stop. Held-out cores occur in the evaluation rows only. In a shape a string
names a value; what the request does not say is null in the call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from demo_data import pools, values
from demo_data.values import Maker

COMMAND_OPENERS = (
    "", "", "", "Please ", "Could you ", "Can you ", "Can you please ", "Would you ", "I need you to ",
    "I'd like you to ", "I want you to ", "Hey, ", "Hi, please ", "Hello, could you ", "Quick one: ", "Be so kind and ",
    "When you have a minute, ", "Okay, ", "Next, ", "Do me a favour and ",
)  # fmt: skip
STATEMENT_OPENERS = ("", "", "Hi, ", "Hey, ", "Hello, ", "Okay, ", "Right, ", "So, ", "Good morning, ", "Listen, ")
COMMAND_CLOSERS = ("", "", "", "", ", please", ", thanks", ", thank you", ", if you can", ", as soon as you can")
STATEMENT_CLOSERS = ("", "", "", ", please", ", thanks", ", thank you")


@dataclass(frozen=True)
class Detail:
    """Something a request may say besides its core.

    Args:
        share: How often it is said.
        said: Its phrasings; each uses the same values.
        front: May also open the request.
        last: Comes after the details that could be read as part of it.
    """

    share: float
    said: tuple[str, ...]
    front: bool = False
    last: bool = False


@dataclass(frozen=True)
class Intent:
    """One kind of request.

    Args:
        shape: The call; strings name values, but for `call` itself.
        makers: How the values are made.
        tags: Value name -> slot name of the tagging set.
        commands: Cores that follow "please" or "could you".
        statements: Cores that are sentences of their own.
        unseen: Cores (commands) of a fifth of the evaluation rows.
        details: What else may be said.
        sentence: The request in standard words; a part in brackets is dropped when a value of it is missing.
    """

    shape: Mapping[str, Any]
    makers: Mapping[str, Maker]
    commands: tuple[str, ...]
    statements: tuple[str, ...]
    unseen: tuple[str, ...]
    details: tuple[Detail, ...]
    sentence: str

    @property
    def call(self) -> str:
        """The name of the call, which is the label of the classification set."""
        return str(self.shape["call"])


def _date(share: float, *said: str) -> Detail:
    return Detail(share, said or ("on {date}",), front=True)


def _time(share: float, *said: str) -> Detail:
    return Detail(share, said or ("at {time}",))


BOOK = Intent(
    shape={
        "call": "book",
        "place": "place",
        "guests": "guests",
        "when": {"date": "date", "time": "time"},
        "not": "not",
    },
    makers={
        "place": values.pooled(pools.PLACE_FIRST, pools.PLACE_SECOND),
        "guests": values.count,
        "date": values.date,
        "time": values.time,
        "not": values.several(pools.SEATS, "or", most=1),
    },
    commands=(
        "book a table at {place}", "book us a table at {place}", "reserve a table at {place}", "get a table at {place}",
        "get us a table at {place}", "book {place}", "make a reservation at {place}", "reserve seats at {place}",
        "find me a table at {place}", "arrange a table at {place}", "make a booking at {place}", "book dinner at {place}",
        "set up a table at {place}", "get me a reservation at {place}", "put us down at {place}", "ask {place} for a table",
    ),
    statements=(
        "I'd like a table at {place}", "we want to eat at {place}", "we need a table at {place}", "a table at {place}",
        "I want to have dinner at {place}", "we are going to {place}", "I'm looking for a table at {place}",
        "we would love to eat at {place}",
    ),
    unseen=(
        "save a table at {place}", "sort out a table at {place}", "call {place} and reserve a table",
        "hold a table for us at {place}", "secure a spot at {place}",
    ),
    details=(
        Detail(0.7, ("for {guests}", "for {guests} people", "for {guests} guests", "for a group of {guests}",
                     "for a party of {guests}", ". We are {guests}", ". There will be {guests} of us")),
        _date(0.65, "on {date}", "on {date}", "for {date}"),
        _time(0.6, "at {time}", "at {time}", "from {time}"),
        Detail(0.3, ("but not near {not}", "but not by {not}", "away from {not}", "not next to {not}",
                     ". Anywhere but near {not}", ". Nothing near {not}"), last=True),
    ),
    sentence="Book a table[ for {guests}] at {place}[ on {date}][ at {time}][, not near {not}].",
)  # fmt: skip

PAY = Intent(
    shape={"call": "pay", "to": "to", "amount": "amount", "when": {"date": "date"}, "for": "for", "not": "not"},
    makers={
        "to": values.person,
        "amount": values.amount,
        "date": values.date,
        "for": values.pooled(pools.REASONS),
    },
    commands=(
        "send {amount} to {to}", "send {to} {amount}", "pay {to} {amount}", "pay {amount} to {to}",
        "transfer {amount} to {to}", "wire {amount} to {to}", "give {to} {amount}", "move {amount} to {to}",
        "make a payment of {amount} to {to}", "make a transfer of {amount} to {to}", "pay back {amount} to {to}",
        "put {amount} in the account of {to}", "send a payment of {amount} to {to}", "refund {to} {amount}",
        "send over {amount} to {to}", "pay {to} the {amount} I owe",
    ),
    statements=(
        "I owe {to} {amount}", "{to} gets {amount}", "{to} should get {amount} from me", "I have to pay {to} {amount}",
        "{amount} should go to {to}", "I need to send {amount} to {to}", "{to} is waiting for {amount}",
        "I promised {to} {amount}",
    ),
    unseen=(
        "let {to} have {amount}", "settle {amount} with {to}", "hand {to} {amount}", "see that {to} receives {amount}",
        "forward {amount} to {to}",
    ),
    details=(
        _date(0.5, "on {date}", "on {date}", "by {date}"),
        Detail(0.6, ("for {for}", "for {for}", "to cover {for}", ". It is for {for}", ". That's for {for}")),
    ),
    sentence="Pay {amount} to {to}[ for {for}][ on {date}].",
)  # fmt: skip

REMIND = Intent(
    shape={"call": "remind", "task": "task", "when": {"date": "date", "time": "time"}, "not": "not"},
    makers={
        "task": values.pooled(pools.TASK_VERBS, pools.TASK_OBJECTS),
        "date": values.date,
        "time": values.time,
    },
    commands=(
        "remind me to {task}", "set a reminder to {task}", "don't let me forget to {task}", "make a note to {task}",
        "add a reminder to {task}", "tell me to {task}", "make sure I remember to {task}", "help me remember to {task}",
        "put down that I have to {task}", "create a reminder to {task}", "write down that I must {task}",
        "note that I need to {task}", "set an alert to {task}", "warn me that I have to {task}", "ping me to {task}",
        "send me a reminder to {task}",
    ),
    statements=(
        "I need to {task}", "I must not forget to {task}", "I have to {task}", "I want to remember to {task}",
        "I need a reminder to {task}", "I always forget to {task}", "I should {task}", "a reminder to {task}",
    ),
    unseen=(
        "nudge me to {task}", "keep in mind that I have to {task}", "schedule a reminder to {task}",
        "poke me so that I {task}", "alert me to {task}",
    ),
    details=(_date(0.8), _time(0.75, "at {time}", "at {time}", "around {time}")),
    sentence="Reminder[ on {date}][ at {time}]: {task}.",
)  # fmt: skip

ORDER = Intent(
    shape={"call": "order", "item": {"name": "name", "count": "count"}, "with": "with", "not": "not"},
    makers={
        "name": values.pooled(pools.SIZES, pools.DISHES, pools.FORMS),
        "count": values.count,
        "with": values.several(pools.EXTRAS, "and"),
        "not": values.several(pools.EXTRAS, "or"),
    },
    commands=(
        "order {count} {name}", "get me {count} {name}", "order me {count} {name}", "bring me {count} {name}",
        "add {count} {name} to my order", "put in an order of {count} {name}", "buy {count} {name}",
        "place an order of {count} {name}", "get {count} portions of {name}", "order {count} portions of {name}",
        "bring us {count} {name}", "send us {count} {name}", "deliver {count} {name}", "get us {count} plates of {name}",
        "put {count} {name} on the order", "order lunch, {count} {name}",
    ),
    statements=(
        "I'd like {count} {name}", "we'd like {count} {name}", "I'll have {count} {name}", "{count} {name} for us",
        "we'll take {count} {name}", "I want {count} {name}", "we want {count} portions of {name}",
        "I'm hungry for {count} {name}",
    ),
    unseen=(
        "fetch us {count} {name}", "serve us {count} {name}", "rustle up {count} {name}", "sign me up for {count} {name}",
        "have them cook {count} {name}",
    ),
    details=(
        Detail(0.45, ("with {with}", "with extra {with}", "with {with} on top", "and add {with}", ". Add {with}")),
        Detail(0.6, ("without {not}", "with no {not}", "but no {not}", "and leave out the {not}", "minus the {not}",
                     ". No {not}", ". I can't eat {not}", ". We don't want {not}")),
    ),
    sentence="Order {count} {name}[ with {with}][ without {not}].",
)  # fmt: skip

CANCEL = Intent(
    shape={"call": "cancel", "who": "who", "when": {"date": "date", "time": "time"}, "not": "not"},
    makers={
        "who": values.person,
        "date": values.date,
        "time": values.time,
        "not": values.other_person,
    },
    commands=(
        "cancel my meeting with {who}", "cancel the meeting with {who}", "call off the meeting with {who}",
        "drop my call with {who}", "cancel my appointment with {who}", "remove the meeting with {who}",
        "delete my meeting with {who}", "cancel the call with {who}", "take the meeting with {who} off my calendar",
        "get me out of the meeting with {who}", "clear my appointment with {who}", "cancel lunch with {who}",
        "scrap the call with {who}", "tell {who} that our meeting is off", "undo the appointment with {who}",
        "cancel what I have with {who}",
    ),
    statements=(
        "I can't meet {who}", "I have to cancel on {who}", "the meeting with {who} is off", "I won't see {who}",
        "my call with {who} isn't happening", "I no longer meet {who}", "I can't make it to the meeting with {who}",
        "there is no meeting with {who}",
    ),
    unseen=(
        "strike the meeting with {who}", "wipe my appointment with {who}", "let {who} know I am not coming",
        "back out of the call with {who}", "erase the meeting with {who}",
    ),
    details=(
        _date(0.7, "on {date}", "on {date}"),
        _time(0.55),
        Detail(0.45, (", but not the one with {not}", ", but keep the one with {not}", ", not the one with {not}",
                      ". Keep the one with {not}", ". The one with {not} stays", ". Don't touch the one with {not}"),
               last=True),
    ),
    sentence="Cancel the meeting with {who}[ on {date}][ at {time}][, not the one with {not}].",
)  # fmt: skip

PLAY = Intent(
    shape={"call": "play", "song": {"title": "title", "by": "by"}, "when": {"time": "time"}, "not": "not"},
    makers={
        "title": values.pooled(pools.TITLE_FIRST, pools.TITLE_SECOND),
        "by": values.pooled(pools.BANDS, prefix="the "),
        "time": values.time,
        "not": values.several(pools.VERSIONS, "or"),
    },
    commands=(
        "play {title}", "put on {title}", "play the song {title}", "start {title}", "play me {title}", "queue {title}",
        "let me hear {title}", "turn on {title}", "play {title} for me", "add {title} to the queue", "find and play {title}",
        "put {title} on", "start playing {title}", "play the track {title}", "stream {title}", "let us listen to {title}",
    ),
    statements=(
        "I want to hear {title}", "I'd like to listen to {title}", "I'm in the mood for {title}", "I feel like {title}",
        "we want to dance to {title}", "I'd love to hear {title}", "some music: {title}", "next song: {title}",
    ),
    unseen=(
        "spin {title}", "blast {title}", "cue up {title}", "treat me to {title}", "switch to {title}",
    ),
    details=(
        Detail(0.65, ("by {by}", "by {by}", "from {by}")),
        Detail(0.35, ("at {time}", "at {time}")),
        Detail(0.45, ("but no {not}", "without {not}", "and skip {not}", ". No {not}", ". I don't want {not}",
                      ". Leave out {not}"), last=True),
    ),
    sentence="Play {title}[ by {by}][ at {time}][, no {not}].",
)  # fmt: skip

WEATHER = Intent(
    shape={"call": "weather", "place": "place", "when": {"date": "date", "time": "time"}, "not": "not"},
    makers={
        "place": values.pooled(pools.CITIES),
        "date": values.date,
        "time": values.time,
        "not": values.several(pools.WEATHER_PARTS, "or"),
    },
    commands=(
        "check the weather in {place}", "tell me the weather in {place}", "get the forecast for {place}",
        "look up the weather in {place}", "give me the forecast for {place}", "show me the weather in {place}",
        "tell me how warm it gets in {place}", "find out if it rains in {place}", "see if it is sunny in {place}",
        "tell me if I need an umbrella in {place}", "check the forecast for {place}", "give me the weather for {place}",
        "tell me how cold it is in {place}", "see what the weather does in {place}", "read me the forecast for {place}",
        "check if it will be dry in {place}",
    ),
    statements=(
        "I need the forecast for {place}", "what is the weather like in {place}", "will it rain in {place}",
        "how is the weather in {place}", "do I need a coat in {place}", "how hot is it in {place}",
        "I want to know the weather in {place}", "is it warm in {place}",
    ),
    unseen=(
        "predict the weather in {place}", "describe the weather in {place}", "say whether it gets windy in {place}",
        "pull up the forecast for {place}", "fetch the temperature in {place}",
    ),
    details=(
        _date(0.75, "on {date}", "on {date}", "for {date}"),
        _time(0.4),
        Detail(0.35, ("but not {not}", "without {not}", "and skip {not}", ". Leave out {not}", ". I don't care about {not}",
                      ". Don't mention {not}"), last=True),
    ),
    sentence="Weather in {place}[ on {date}][ at {time}][, without {not}].",
)  # fmt: skip

INTENTS = (BOOK, PAY, REMIND, ORDER, CANCEL, PLAY, WEATHER)
TAGS = {
    "place": "PLACE", "guests": "COUNT", "count": "COUNT", "date": "DATE", "time": "TIME", "not": "NOT", "with": "WITH",
    "to": "PERSON", "who": "PERSON", "amount": "AMOUNT", "for": "REASON", "task": "TASK",
    "name": "ITEM", "title": "TITLE", "by": "ARTIST",
}  # fmt: skip
