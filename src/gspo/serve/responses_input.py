"""The chat that a request to `/v1/responses` stands for.

Nothing is stored: each request brings the whole conversation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from gspo.core.errors import RequestError, shown, suggestion
from gspo.serve.messages import check_whole_characters, joined_texts, texts_in
from gspo.serve.schemas import AnsweredBody, ChatBody, Dicts, ranged

Included = Literal["message.output_text.logprobs"]
_TEXTS = ("input_text", "output_text", "text")
_PARTS = {"text": {"format", "verbosity"}, "reasoning": {"effort", "summary", "generate_summary"}}
"""What these objects may hold. Summaries: nothing is summed up, so whichever kind is asked for."""


class ResponsesBody(AnsweredBody):
    """POST /v1/responses."""

    input: str | Dicts
    instructions: str | None = None
    max_output_tokens: int | None = ranged(1)
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    include: Annotated[list[Included], Field(fail_fast=True)] | None = None
    metadata: dict[str, Any] | None = None


_SHARED = AnsweredBody.model_fields.keys() - {"tools", "tool_choice"}
"""Fields that mean the same in a chat."""


def chat_of(body: ResponsesBody) -> ChatBody:
    """The chat that a request stands for.

    Raises:
        RequestError: an item, a tool or a format that means nothing here.
    """
    body.refuse_unknown()
    for name, known in _PARTS.items():
        for part in (getattr(body, name) or {}).keys() - known:
            near = suggestion(part, known, cutoff=0.7)
            raise RequestError(f"unknown parameter '{name}.{part}'.{near}", f"{name}.{part}")
    check_whole_characters(texts_in([*vars(body).values()]))  # the answer repeats them
    if body.n not in (None, 1):
        raise RequestError(f"n = {body.n}: a response is one completion", "n")
    logprobs = "message.output_text.logprobs" in (body.include or ())
    fields: dict[str, Any] = {
        **body.model_dump(include=_SHARED, exclude_none=True),
        "messages": _messages(body),
        "max_completion_tokens": body.max_output_tokens,
        "tools": [_tool(tool, i) for i, tool in enumerate(body.tools or ())],
        "tool_choice": _choice(body.tool_choice),
        "response_format": _format((body.text or {}).get("format")),
        "reasoning_effort": (body.reasoning or {}).get("effort"),
        "logprobs": logprobs or bool(body.top_logprobs),
    }
    try:
        return ChatBody.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])).replace("messages", "input")
        raise RequestError(f"{name}: {first['msg']}", name) from None


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    items = body.input
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    for number, item in enumerate(items):
        _add(messages, item, f"input[{number}]")
    return messages


def _add(messages: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    """Add an item of the conversation. Reasoning, a text and calls may be one turn of the model."""
    kind = item.get("type", "message")
    if kind == "function_call_output":
        output = _text(item.get("output"), f"{where}.output")
        message = {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
        messages.append(message)
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        if not messages or messages[-1]["role"] != "assistant":  # else it is of that turn
            messages.append({"role": "assistant", "content": None})
        turn = messages[-1]
        turn["tool_calls"] = [*(turn.get("tool_calls") or []), call]
    elif kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        thought = "".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))
        messages.append({"role": "assistant", "content": None, "reasoning_content": thought})
    elif kind == "message" and item.get("role") == "assistant":
        turn = messages[-1] if messages and "reasoning_content" in messages[-1] else None
        if turn is None or turn["content"] is not None or "tool_calls" in turn:
            messages.append(turn := {"role": "assistant"})
        turn["content"] = _text(item.get("content"), f"{where}.content")
    elif kind == "message":
        content = _text(item.get("content"), f"{where}.content")
        messages.append({"role": item.get("role"), "content": content})
    else:
        raise RequestError(f"{where}: items of type {shown(kind)} are not supported", "input")


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    return joined_texts(parts, _TEXTS, f"{where}: only text is supported", "input")


def _tool(tool: Mapping[str, Any], number: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        kind = shown(tool.get("type"))
        raise RequestError(f"tools[{number}]: only functions are supported, not {kind}", "tools")
    names = ("name", "description", "parameters", "strict")
    function = {name: tool[name] for name in names if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _choice(choice: Any) -> Any:
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _format(given: Any) -> Any:
    if isinstance(given, Mapping) and given.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {"schema": given.get("schema")}}
    return given
