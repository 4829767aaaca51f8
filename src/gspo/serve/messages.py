"""Messages and tools in requests: OpenAI's form, checked, and as templates want them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gspo.core.errors import RequestError, shown
from gspo.serve.call_formats import Tools

_LOST = {
    "function_call": "give tool_calls, each answered by a message with the role 'tool'",
    "audio": "this server reads text",
}
"""Fields of messages that say something which no template would show."""


def text_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with their text parts joined.

    Raises:
        RequestError: a message without a role, or with parts that are not text.
    """
    return [_with_plain_text(message, i) for i, message in enumerate(messages)]


def texts_in(value: Any) -> list[str]:
    """Every text in a value of JSON, however deep it stands.

    >>> texts_in([{"role": "user", "content": "hi"}])
    ['role', 'user', 'content', 'hi']
    """
    found, left = [], [value]
    while left:  # no recursion: a client chooses how deep it is
        item = left.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, Mapping):
            left += [part for pair in reversed([*item.items()]) for part in reversed(pair)]
        elif isinstance(item, list):
            left += reversed(item)
    return found


def check_whole_characters(texts: Iterable[str]) -> None:
    """Refuse halves of surrogate pairs: JSON can spell them, but they are no characters.

    Raises:
        RequestError: a text has one in it.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"a text has half a surrogate pair in it: {error}") from None


def _with_plain_text(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    if not isinstance(message.get("role"), str):
        raise RequestError(f"messages[{index}] has no role", param="messages")
    for name, instead in _LOST.items():
        if message.get(name):
            raise RequestError(f"messages[{index}].{name} is not supported: {instead}", "messages")
    content = message.get("content")
    if isinstance(content, list):
        only = 'only text parts are supported, {"type": "text", "text": "..."}'
        content = joined_texts(content, ("text",), f"messages[{index}]: {only}", "messages")
    if content is not None and not isinstance(content, str):
        raise RequestError(
            f"messages[{index}].content = {shown(content)}: must be text, or a list of text parts",
            param="messages",
        )
    return {**message, "content": content or ""}


def joined_texts(parts: Sequence[Any], kinds: Sequence[str], only: str, param: str) -> str:
    """The text of the parts of a message.

    Args:
        kinds: types of parts that are text.
        only: what else is refused with.

    Raises:
        RequestError: a part of another type.
    """
    for part in parts:
        fine = isinstance(part, Mapping) and part.get("type") in kinds
        if not fine or not isinstance(part.get("text"), str):
            raise RequestError(f"{only}, not {shown(part)}", param)
    return "".join(part["text"] for part in parts)


def tools_of(tools: Sequence[dict]) -> Tools:
    """Name -> schema of the arguments.

    Raises:
        RequestError: something that is no function with a name, or two with one name.
    """
    named: dict[str, Mapping[str, Any]] = {}
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        schema = function.get("parameters") or {} if isinstance(function, Mapping) else None
        plain = isinstance(tool, Mapping) and tool.get("type", "function") == "function"
        if not (plain and isinstance(name, str) and name and isinstance(schema, Mapping)):
            raise RequestError(
                f"tools[{number}] = {shown(tool)}: must be "
                '{"type": "function", "function": {"name": ..., "parameters": a JSON schema}}',
                param="tools",
            )
        if name in named:
            raise RequestError(f"tools[{number}]: there are two tools named {name!r}", "tools")
        named[name] = schema
    return named


def check_calls(messages: Sequence[dict]) -> None:
    """Refuse tool calls that are not in OpenAI's form.

    Raises:
        RequestError: it names the message.
    """
    for number, message in enumerate(messages):
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(map(_is_call, calls)):
            raise RequestError(
                f"messages[{number}].tool_calls is {shown(calls)}: must be a list of "
                '{"id": ..., "type": "function", "function": {"name": ..., "arguments": text}}',
                param="messages",
            )


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, Mapping) else None
    return (
        isinstance(function, Mapping)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("arguments"), str | None)
        and isinstance(call.get("id"), str | None)
    )


def with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls' arguments are objects, if their text is that of one."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call.get("function") or {})
        try:
            value = json.loads(function.get("arguments") or "{}")
        except (ValueError, TypeError, RecursionError):
            value = None
        if isinstance(value, dict):
            function["arguments"] = value
        calls.append(call | {"function": function})
    return message | {"tool_calls": calls}
