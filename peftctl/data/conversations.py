"""Conversations as users write them (OpenAI messages, ShareGPT) -> checked messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peftctl.data.problems import kind, wrong
from peftctl.errors import did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool")

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Args:
        role: One of `ROLES`.
        content: Its text; None for a message that only calls tools.
        train: Whether to train on it; None leaves it to `data.loss_on`.
        extra: Whatever else a chat template may read: tool_calls, tool_call_id, name, reasoning_content, ...
    """

    role: str
    content: str | None
    train: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates expect it."""
        return {"role": self.role, "content": self.content, **self.extra}

    @property
    def calls_tools(self) -> bool:
        """Whether it calls tools."""
        return bool(self.extra.get("tool_calls"))

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing in it to learn."""
        return not (self.content or "").strip() and not self.calls_tools


def read_messages(value: Any, where: str, columns: Mapping[str, str]) -> list[Message]:
    """Return the messages of a `messages` field: [{role, content, train?, tool_calls?, ...}].

    Raises:
        DataError: A message lacks a key, or one has the wrong type.
    """
    role_key, content_key, train_key = (columns.get(name, name) for name in ("role", "content", "train"))
    messages = []
    for i, item in enumerate(_objects(value, where, "messages")):
        place = f"{where}: messages[{i}]"
        if role_key not in item:
            hint = "it looks like data.format: sharegpt" if "from" in item else ""
            raise wrong(place, f"key '{role_key}' is missing; the message has: {', '.join(item)}", hint)
        role = item[role_key]
        if role not in ROLES:
            raise wrong(f"{place}.{role_key}", f"unknown role {role!r}", did_you_mean(str(role), ROLES))
        extra = {key: v for key, v in item.items() if key not in (role_key, content_key, train_key) and v is not None}
        calls = _tool_calls(_parsed(extra.pop("tool_calls", []), f"{place}.tool_calls"), f"{place}.tool_calls")
        if calls:
            extra["tool_calls"] = calls
        content = _content(item, content_key, place, optional=role == "assistant")
        content = "" if content is None and not calls else content
        messages.append(Message(role, content, _train(item.get(train_key), role, f"{place}.{train_key}"), extra))
    return messages


def read_sharegpt(value: Any, where: str, columns: Mapping[str, str]) -> list[Message]:
    """Return the messages of a `conversations` field: [{from, value, train?}].

    The value of a `function_call` is JSON: {"name", "arguments"}, or a list of such calls.

    Raises:
        DataError: A turn lacks a key, or one has the wrong type.
    """
    from_key, value_key, train_key = (columns.get(name, name) for name in ("from", "value", "train"))
    messages = []
    for i, item in enumerate(_objects(value, where, "conversations")):
        place = f"{where}: conversations[{i}]"
        if from_key not in item:
            hint = "it looks like data.format: messages" if "role" in item else ""
            raise wrong(place, f"key '{from_key}' is missing; the turn has: {', '.join(item)}", hint)
        sender = item[from_key]
        if sender not in _SHAREGPT_ROLES:
            raise wrong(f"{place}.{from_key}", f"unknown sender {sender!r}", did_you_mean(str(sender), _SHAREGPT_ROLES))
        role = _SHAREGPT_ROLES[sender]
        content = _content(item, value_key, place, optional=False)
        train = _train(item.get(train_key), role, f"{place}.{train_key}")
        if sender == "function_call":
            calls = _tool_calls(_parsed(content, f"{place}.{value_key}"), f"{place}.{value_key}")
            messages.append(Message(role, None, train, {"tool_calls": calls}))
        else:
            messages.append(Message(role, content, train))
    return messages


def read_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Return the tools offered in a conversation: a list of JSON schemas, or such a list as text."""
    if value is None or value == "":
        return None
    tools = _parsed(value, f"{where}: tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise wrong(f"{where}: tools", f"expected a list of objects, got {kind(tools)}")
    return [_without_nulls(tool) for tool in tools] or None


def _objects(value: Any, where: str, name: str) -> list[dict[str, Any]]:
    items = _parsed(value, f"{where}: {name}")
    if not isinstance(items, list):
        raise wrong(f"{where}: {name}", f"expected a list of objects, got {kind(items)}")
    if not items:
        raise wrong(f"{where}: {name}", "expected at least one message, got an empty list")
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            raise wrong(f"{where}: {name}[{i}]", f"expected an object, got {kind(item)}")
    return items


def _parsed(value: Any, where: str) -> Any:
    """Return what JSON text stands for; csv and parquet keep structures as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise wrong(where, f"expected JSON: {error.msg} at character {error.pos + 1}") from error


def _content(item: Mapping[str, Any], key: str, place: str, *, optional: bool) -> str | None:
    """Return text; parts of type text are joined."""
    value = item.get(key)
    if isinstance(value, str) or (value is None and optional):
        return value
    if isinstance(value, list):
        for i, part in enumerate(value):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                found = part.get("type") if isinstance(part, dict) else kind(part)
                raise wrong(f"{place}.{key}[{i}]", f'expected {{"type": "text", "text": ...}}, got {found}')
        return "".join(part["text"] for part in value)
    if key not in item:
        raise wrong(place, f"key '{key}' is missing; the message has: {', '.join(item)}")
    raise wrong(f"{place}.{key}", f"expected text, got {kind(value)}")


def _train(value: Any, role: str, where: str) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise wrong(where, f"expected true or false, got {kind(value)}")
    if value and role != "assistant":
        raise wrong(where, f"only assistant messages can be trained on, this is a {role} message", "remove the flag")
    return value


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Return calls as {"type": "function", "function": {"name", "arguments": object}}, the form templates expect."""
    calls = []
    for call in [value] if isinstance(value, dict) else value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise wrong(
                where, "expected calls with a function name and arguments", 'e.g. {"name": ..., "arguments": {}}'
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            # The OpenAI form has the arguments as text; templates would quote it a second time.
            arguments = _parsed(arguments or "{}", f"{where}.arguments")
        outer = {key: v for key, v in call.items() if key in ("id", "type") and v is not None}
        function = {"name": function["name"], "arguments": _without_nulls(arguments or {})}
        calls.append({"type": "function", **outer, "function": function})
    return calls


def _without_nulls(value: Any) -> Any:
    """Return the structure without null members: columnar files fill every row to the union of all keys."""
    if isinstance(value, dict):
        return {key: _without_nulls(member) for key, member in value.items() if member is not None}
    if isinstance(value, list):
        return [_without_nulls(member) for member in value]
    return value
