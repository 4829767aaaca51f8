"""Tools and tool calls in requests: OpenAI's form, checked, and calls as templates want them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gspo.core.errors import RequestError, shown
from gspo.serve.call_formats import Tools


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
        if not isinstance(name, str) or not name or not isinstance(schema, Mapping):
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
