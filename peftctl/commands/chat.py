"""`peftctl chat`: a conversation with a run, an adapter or a model, streamed as it is generated."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from peftctl.artifacts.load import Artefact, load, locate
from peftctl.artifacts.locate import fetched
from peftctl.artifacts.several import BASE, activate, load_several
from peftctl.backends import device as devices
from peftctl.data import templates
from peftctl.data.conversations import Message
from peftctl.data.formats import Example
from peftctl.data.prompts import generation_prompt
from peftctl.errors import PeftctlError, UsageError, did_you_mean
from peftctl.evaluation.generation import answer_room, position_limit, prompts_of, refuse_overlong
from peftctl.evaluation.streaming import stream_text
from peftctl.models.classifier import classification_task
from peftctl.recipe.schema import DataSection

COMMANDS = {
    "/help": "show these commands",
    "/use": "list the adapters; /use NAME lets another answer, /use base none of them",
    "/reset": "forget the conversation",
    "/quit": "leave; so does the end of input",
}
# Only how a prompt is rendered is read of these; what is said is never cut.
_CHAT = DataSection(train="", max_length=sys.maxsize)
_PLAIN = DataSection(train="", format="prompt_completion", template="{prompt}", max_length=sys.maxsize)


@dataclass(frozen=True)
class Voice:
    """How an adapter is asked.

    Args:
        tokenizer: What it was trained with.
        frame: See `ChatSession`.
        target: The adapter as the user gave it.
    """

    tokenizer: Any
    frame: Callable[[str], str] | None
    target: str


class ChatSession:
    """A conversation with a model.

    Args:
        model: A causal language model or an encoder-decoder, in evaluation mode.
        tokenizer: Its tokenizer.
        system: A system message before the conversation.
        max_new_tokens: Tokens an answer may have.
        temperature: Above 0, draws tokens from the softmax of logits / temperature; 0 takes the likeliest.
        frame: Puts a message into a plain template, for models without a chat template: then every message stands
            alone. None holds a conversation in the tokenizer's chat template.
        voices: The adapters on the model by name, the active one first; empty where there is nothing to switch.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        system: str | None = None,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        frame: Callable[[str], str] | None = None,
        voices: Mapping[str, Voice] | None = None,
    ):
        if max_new_tokens < 1 or temperature < 0:
            raise UsageError("expected --max-new-tokens of at least 1 and --temperature of at least 0")
        self.voices = dict(voices or {})
        framed = frame is not None or any(voice.frame is not None for voice in self.voices.values())
        if framed and system is not None:
            raise UsageError("--system: this model is asked through a plain template, which has no place for it")
        self.model = model
        self.tokenizer = tokenizer
        self.opening = [] if system is None else [Message("system", system)]
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.frame = frame
        self.limit = position_limit(model)
        self.task = prompts_of(model)
        self.notify: Callable[[str], None] = lambda text: None
        self.exchanges: list[tuple[Message, Message]] = []
        self.speaker = next(iter(self.voices), None)

    def use(self, name: str) -> None:
        """Let another adapter answer, in its own template, or none with `base`; the conversation stays.

        Raises:
            UsageError: There is no such adapter, or nothing to switch.
        """
        if not self.voices:
            raise UsageError("there is one model; start with several adapters to switch: peftctl chat A B")
        if name != BASE:
            name = self._voice_named(name)
            self.tokenizer, self.frame = self.voices[name].tokenizer, self.voices[name].frame
        activate(self.model, name)
        self.speaker = name

    def _voice_named(self, text: str) -> str:
        """Return the adapter of this name, of this target, or whose path ends so."""
        fits = [n for n, voice in self.voices.items() if text in (n, voice.target) or n.endswith(f"/{text}")]
        if len(fits) != 1:
            raise UsageError(f"no adapter '{text}'; {did_you_mean(text, [*self.voices, BASE])}")
        return fits[0]

    def reset(self) -> None:
        """Forget the conversation, but not the system message."""
        self.exchanges.clear()

    def answer(self, text: str) -> str:
        """Return the whole answer to a message."""
        return "".join(self.stream(text))

    def stream(self, text: str) -> Generator[str, None, None]:
        """Yield the answer to a message in pieces; closing the iterator stops it and keeps what came so far.

        Raises:
            UsageError: The message alone is longer than the model's positions.
            DataError: The chat template refuses the conversation.
        """
        message = Message("user", text)
        prompt = self._fitting_prompt(message)
        most = min(self.max_new_tokens, answer_room(self.model, len(prompt)))
        pieces = stream_text(self.model, self.tokenizer, prompt, max_new_tokens=most, temperature=self.temperature)
        said = ""
        try:
            for piece in pieces:
                said += piece
                yield piece
        finally:
            pieces.close()
            if said and self.frame is None:
                self.exchanges.append((message, Message("assistant", said)))

    def _fitting_prompt(self, message: Message) -> list[int]:
        """Return the prompt, after dropping the oldest exchanges that leave no room for an answer."""
        kept = list(self.exchanges)
        prompt = self._prompt(kept, message)
        if self.limit is not None:
            room = 0 if self.model.config.is_encoder_decoder else min(self.max_new_tokens, self.limit // 2)
            while kept and len(prompt) + room > self.limit:
                del kept[0]
                prompt = self._prompt(kept, message)
            refuse_overlong(self.model, len(prompt), "this message")
        if len(kept) < len(self.exchanges):
            self.notify(f"the conversation is too long for {self.limit} positions; its beginning was dropped")
            self.exchanges = kept
        return prompt

    def _prompt(self, exchanges: list[tuple[Message, Message]], message: Message) -> list[int]:
        """Return the tokens that stood before such an answer in training."""
        if self.frame is not None:
            example = Example("this message", prompt=self.frame(message.content or ""), completion="?")
            return generation_prompt(example, self.tokenizer, _PLAIN, self.task)[0]
        said = [turn for exchange in exchanges for turn in exchange]
        conversation = [*self.opening, *said, message, Message("assistant", "?")]
        return generation_prompt(Example("this message", messages=conversation), self.tokenizer, _CHAT, self.task)[0]


def open_session(
    target: str | Sequence[str], *, system: str | None = None, max_new_tokens: int = 512, temperature: float = 0.0
) -> ChatSession:
    """Load a target and start a conversation, in the template that its run was trained with.

    Args:
        target: Run directory, adapter directory, model directory, hub id or alias; or several adapters of one base.
        system: A system message.
        max_new_tokens: Tokens an answer may have.
        temperature: 0 answers greedily.

    Raises:
        PeftctlError: The target can't be loaded, or its template is not one for single messages.
    """
    devices.start_process()
    targets = [target] if isinstance(target, str) else list(target)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    if len(targets) == 1:
        template = _template(fetched(locate(targets[0])))
        model, tokenizer = load(targets[0], device=devices.current_device())
        refuse_classifier(model, targets[0])
        return ChatSession(model, tokenizer, system, frame=_frame(template, tokenizer), **options)
    several = load_several(targets, device=devices.current_device())
    refuse_classifier(several.model, targets[0])
    voices = {
        name: Voice(tokenizer, _frame(_template(several.artefacts[name]), tokenizer), several.artefacts[name].target)
        for name, tokenizer in several.tokenizers.items()
    }
    first = next(iter(voices.values()))
    return ChatSession(several.model, first.tokenizer, system, frame=first.frame, voices=voices, **options)


def answer_once(session: ChatSession, prompt: str, write: Callable[[str], None]) -> None:
    """Write the answer to one message; of several adapters each answers it, under its name."""
    for name in session.voices or [None]:
        if name is not None:
            session.use(name)
            session.reset()
            write(f"{name}: ")
        for piece in session.stream(prompt):
            write(piece)
        write("\n")


def repl(session: ChatSession, read: Callable[[], str | None], write: Callable[[str], None]) -> None:
    """Read messages and commands and write answers, until /quit or the end of input.

    Args:
        session: The conversation.
        read: Returns a line, None at the end of input; KeyboardInterrupt from it is Ctrl-C at the prompt.
        write: Shows text as it comes, without adding a line end.
    """
    session.notify = lambda text: write(f"({text})\n")
    write("Ctrl-C stops an answer; /help shows the commands.\n")
    if session.voices:
        _show_voices(session, write)
    while True:
        try:
            line = read()
        except KeyboardInterrupt:
            write("\n(/quit leaves)\n")
            continue
        if line is None or line.strip() == "/quit":
            return
        if line.startswith("/"):
            _command(session, line.strip(), write)
        elif line.strip():
            _say(session, line.strip(), write)


def _command(session: ChatSession, line: str, write: Callable[[str], None]) -> None:
    name, _, argument = line.partition(" ")
    if name == "/use":
        _use(session, argument.strip(), write)
    elif argument:
        write(f"({name} takes nothing after it. A message may begin with / after a space)\n")
    elif name == "/reset":
        session.reset()
        write("(a new conversation)\n")
    elif name == "/help":
        write("".join(f"{command:8} {effect}\n" for command, effect in COMMANDS.items()))
    else:
        write(f"(no command {name}; {did_you_mean(name, COMMANDS)} A message may begin with / after a space)\n")


def _use(session: ChatSession, name: str, write: Callable[[str], None]) -> None:
    try:
        if name or not session.voices:
            session.use(name)
    except UsageError as error:
        write(f"({error})\n")
    else:
        _show_voices(session, write)


def _show_voices(session: ChatSession, write: Callable[[str], None]) -> None:
    """Write the adapters, and which of them answers."""
    names = [f"[{name}]" if name == session.speaker else name for name in (*session.voices, BASE)]
    write(f"(answering: {' '.join(names)}; /use NAME switches)\n")


def _say(session: ChatSession, text: str, write: Callable[[str], None]) -> None:
    pieces = session.stream(text)
    try:
        if session.speaker is not None:
            write(f"{session.speaker}: ")
        for piece in pieces:
            write(piece)
        write("\n")
    except KeyboardInterrupt:
        write(" ...\n(stopped)\n")
    except PeftctlError as error:
        write(f"error: {error}\n")
    finally:
        pieces.close()


def refuse_classifier(model: Any, target: str) -> None:
    """Raise a UsageError where a model names classes, and so has nothing to say."""
    if task := classification_task(model):
        raise UsageError(f"{target}: is a classifier ({task}), which writes no text; measure it with peftctl eval")


def _template(artefact: Artefact) -> str:
    """Return `data.template` that an artefact was trained in, by its own record or its run's; else `chat`."""
    if "template" in artefact.manifest:
        return artefact.manifest["template"]
    if artefact.recipe is None:
        return templates.CHAT
    try:
        return yaml.safe_load(artefact.recipe.read_text(encoding="utf-8"))["data"].get("template", templates.CHAT)
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{artefact.recipe}: can't be read as a recipe ({error}); give the adapter by itself"
        ) from error


def _frame(template: str, tokenizer: Any) -> Callable[[str], str] | None:
    """Return what puts a message into a plain template; None for the chat template, where there is one."""
    if template == templates.CHAT:
        return None if tokenizer.chat_template else str
    return templates.frame(template)
