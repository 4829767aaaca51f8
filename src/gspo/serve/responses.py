"""`/v1/responses`: the chat that it stands for, and its answer as items and events.

Nothing is stored: each request brings the whole conversation.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from pydantic import ValidationError

from gspo.core.errors import RequestError, shown
from gspo.serve.answers import training_fields
from gspo.serve.conversation import Conversation, GrowingMessage
from gspo.serve.engine import Completion, Piece
from gspo.serve.schemas import ChatBody, ResponsesBody

_TEXTS = {"input_text", "output_text", "text"}
_SHARED = {"model", "temperature", "top_p", "top_logprobs", "parallel_tool_calls", "stream"}
_SHARED |= {"top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
_SHARED |= {"logit_bias", "seed", "stop", "stop_token_ids", "min_tokens", "ignore_eos"}
_SHARED |= {"return_routes", "return_token_ids", "chat_template_kwargs"}
"""Fields that a chat has under the same name."""


def chat_of(body: ResponsesBody) -> ChatBody:
    """The chat that a request stands for.

    Raises:
        RequestError: an item, a tool or a format that means nothing here.
    """
    body.refuse_unknown()
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
        turn = _turn(messages)
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


def _turn(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The turn of the model that a call belongs to."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [content]:
        fine = isinstance(part, Mapping) and part.get("type") in _TEXTS
        if not fine or not isinstance(part.get("text"), str):
            raise RequestError(f"{where}: only text is supported, not {shown(part)}", "input")
        texts.append(part["text"])
    return "".join(texts)


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


class GrowingResponse:
    """An answer that is being made, item by item: its events, and the whole of it.

    Args:
        body: what is asked.
        call: the chat that it stands for.
    """

    def __init__(self, body: ResponsesBody, call: Conversation):
        self._call = call
        self._output: list[dict[str, Any]] = []
        self._open: str | None = (
            None  # the field of the chat's deltas that the last item is made of
        )
        self._events = 0
        self._whole: dict[str, Any] = {
            "id": _id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None, **(body.reasoning or {})},
            "store": False,
            "temperature": call.params.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": call.params.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": None,
        }

    def answer(self, completion: Completion) -> dict[str, Any]:
        """The whole answer, without a stream."""
        piece = Piece(
            *(0, completion.token_ids, completion.logprobs, completion.policy_versions),
            completion.finish_reason,
            completion.top_logprobs,
            completion=completion,
        )
        message = GrowingMessage(self._call, 0)
        for _ in self._of_piece(message, piece):
            pass
        return self._whole

    async def events(
        self, pieces: AsyncGenerator[tuple[int, Piece], None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Write a stream of pieces as events."""
        message = GrowingMessage(self._call, 0)
        begun = False
        async with aclosing(pieces):
            async for _, piece in pieces:
                if not begun:
                    begun = True
                    for name in ("created", "in_progress"):
                        yield self._event(f"response.{name}", response=dict(self._whole))
                for event in self._of_piece(message, piece):
                    yield event

    def _of_piece(self, message: GrowingMessage, piece: Piece) -> list[dict[str, Any]]:
        """The events of a piece; with the last one the answer is whole."""
        events: list[dict[str, Any]] = []
        logprobs = (message.logprobs(piece) or {}).get("content", [])
        for delta in message.deltas(piece):
            if "content" in delta:
                events += self._words("content", delta["content"], logprobs)
                logprobs = []
            elif "reasoning_content" in delta:
                events += self._words("reasoning_content", delta["reasoning_content"], [])
            else:
                events += self._close()
                for call in delta["tool_calls"]:
                    events += self._called(call)
        if piece.completion is not None:
            events += self._close()
            events.append(self._end(message, piece.completion))
        return events

    def _words(self, field: str, text: str, logprobs: list[Any]) -> list[dict[str, Any]]:
        events = []
        if self._open != field:
            events = self._close()
            kind, part = _ITEMS[field]
            item = {"id": _id(kind[0]), "type": kind[1], "status": "in_progress", "content": []}
            item |= {"role": "assistant"} if kind[1] == "message" else {"summary": []}
            self._output.append(item)
            self._open = field
            events.append(self._of_item("output_item.added", item=dict(item)))
            item["content"] = [dict(part)]
            events.append(self._of_content("content_part.added", part=dict(part)))
        part = self._output[-1]["content"][0]
        part["text"] += text
        extra: dict[str, Any] = {"logprobs": logprobs} if field == "content" else {}
        if field == "content":
            part["logprobs"] += logprobs
        name = "output_text" if field == "content" else "reasoning_text"
        events.append(self._of_content(f"{name}.delta", delta=text, **extra))
        return events

    def _close(self) -> list[dict[str, Any]]:
        """End the item that is being written, if one is."""
        if self._open is None:
            return []
        item = self._output[-1]
        part, item["status"] = item["content"][0], "completed"
        name, extra = "reasoning_text", {}
        if self._open == "content":
            name, extra = "output_text", {"logprobs": part["logprobs"]}
        self._open = None
        return [
            self._of_content(f"{name}.done", text=part["text"], **extra),
            self._of_content("content_part.done", part=part),
            self._of_item("output_item.done", item=item),
        ]

    def _called(self, call: dict[str, Any]) -> list[dict[str, Any]]:
        item = {"id": _id("fc"), "type": "function_call", "status": "in_progress"}
        item |= {"call_id": call["id"], "name": call["function"]["name"], "arguments": ""}
        self._output.append(item)
        events = [self._of_item("output_item.added", item=dict(item))]
        item |= {"arguments": call["function"]["arguments"], "status": "completed"}
        of_item = {"item_id": item["id"]}
        name = "function_call_arguments"
        delta = self._of_item(f"{name}.delta", delta=item["arguments"], **of_item)
        of_item |= {"name": item["name"], "arguments": item["arguments"]}
        done = self._of_item(f"{name}.done", **of_item)
        return [*events, delta, done, self._of_item("output_item.done", item=dict(item))]

    def _end(self, message: GrowingMessage, completion: Completion) -> dict[str, Any]:
        choice = self._call.choice(0, completion)
        whole = completion.finish_reason != "length"
        prompt, sampled = len(self._call.prompt), len(completion.token_ids)
        self._whole |= {
            "status": "completed" if whole else "incomplete",
            "incomplete_details": None if whole else {"reason": "max_output_tokens"},
            "output": self._output,
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": sampled,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + sampled,
            },
        }
        # What training needs; the temperature of the log-probs is 1 where that of sampling is 0.
        hidden = {"index", "message", "logprobs", "finish_reason", "temperature"}
        self._whole |= {name: value for name, value in choice.items() if name not in hidden}
        self._whole["logprobs_temperature"] = training_fields(completion)["temperature"]
        name = "completed" if whole else "incomplete"
        return self._event(f"response.{name}", response=self._whole)

    def _of_content(self, name: str, /, **fields: Any) -> dict[str, Any]:
        item = self._output[-1]
        return self._of_item(name, item_id=item["id"], content_index=0, **fields)

    def _of_item(self, name: str, /, **fields: Any) -> dict[str, Any]:
        return self._event(f"response.{name}", output_index=len(self._output) - 1, **fields)

    def _event(self, name: str, /, **fields: Any) -> dict[str, Any]:
        self._events += 1
        return {"type": name, "sequence_number": self._events - 1, **fields}


_ITEMS: dict[str, tuple[Sequence[str], dict[str, Any]]] = {
    "content": (
        ("msg", "message"),
        {"type": "output_text", "text": "", "annotations": [], "logprobs": []},
    ),
    "reasoning_content": (("rs", "reasoning"), {"type": "reasoning_text", "text": ""}),
}
"""What a field of a chat's deltas becomes: the item's id and type, and its one part."""


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
