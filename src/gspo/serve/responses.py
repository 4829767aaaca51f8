"""The answer of `/v1/responses`, as items and events. What is asked: `responses_input.py`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from gspo.serve.conversation import Conversation
from gspo.serve.engine import Completion, Piece
from gspo.serve.responses_input import ResponsesBody
from gspo.serve.tool_calls import ToolCall


class GrowingResponse:
    """An answer that is being made, item by item: its events, and the whole of it.

    Args:
        body: what is asked.
        call: the chat that it stands for.
    """

    def __init__(self, body: ResponsesBody, call: Conversation):
        self._call = call
        self._message = call.begin(0, call.prompts[0])
        self._output: list[dict[str, Any]] = []
        self._open = False  # whether the last item is a text that goes on
        self._logprobs: list[Any] = []  # of tokens whose text has not come yet
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
        """The whole answer, without a stream: what its events add up to."""
        size = 1 if self._call.logprobs else len(completion.token_ids)
        for piece in completion.pieces(0, size):
            for _ in self._of_piece(piece):
                pass
        return self._whole

    async def events(
        self, pieces: AsyncGenerator[tuple[int, Piece], None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Write a stream of pieces as events."""
        async with aclosing(pieces):
            async for _, piece in pieces:
                if not self._events:
                    for name in ("created", "in_progress"):
                        yield self._event(name, response=dict(self._whole))
                for event in self._of_piece(piece):
                    yield event

    def _of_piece(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The events of a piece; with the last one the answer is whole."""
        self._logprobs += (self._message.logprobs(piece) or {}).get("content", [])
        for delta in self._message.read(piece):
            if delta.call is not None:
                yield from self._close()
                yield from self._called(delta.call)
            else:
                kind = "reasoning_text" if delta.reasoning else "output_text"
                yield from self._words(kind, delta.reasoning or delta.content)
        if piece.completion is not None:
            yield from self._close()
            yield self._end(piece.completion)

    def _words(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        """Go on in a text, or begin another."""
        if not self._open or self._output[-1]["content"][0]["type"] != kind:
            yield from self._close()
            part: dict[str, Any] = {"type": kind, "text": ""}
            if kind == "output_text":
                part |= {"annotations": [], "logprobs": []}
                item: dict[str, Any] = {"id": _id("msg"), "type": "message", "role": "assistant"}
            else:
                item = {"id": _id("rs"), "type": "reasoning", "summary": []}
            yield self._added(item | {"content": []})
            yield self._of_item("content_part.added", part=dict(part), content_index=0)
            self._output[-1]["content"], self._open = [part], True
        part = self._output[-1]["content"][0]
        part["text"] += text
        extra: dict[str, Any] = {}
        if kind == "output_text":
            extra["logprobs"], self._logprobs = self._logprobs, []
            part["logprobs"] += extra["logprobs"]
        yield self._of_item(f"{kind}.delta", delta=text, content_index=0, **extra)

    def _close(self) -> Iterator[dict[str, Any]]:
        """End the text that is being written, if one is."""
        if self._open:
            self._open = False
            part = self._output[-1]["content"][0]
            fields = {name: part[name] for name in ("text", "logprobs") if name in part}
            yield self._of_item(f"{part['type']}.done", content_index=0, **fields)
            yield self._of_item("content_part.done", part=part, content_index=0)
            yield self._done()

    def _called(self, call: ToolCall) -> Iterator[dict[str, Any]]:
        item = {"id": _id("fc"), "type": "function_call", "call_id": call.id, "name": call.name}
        yield self._added(item | {"arguments": ""})
        self._output[-1]["arguments"] = arguments = call.arguments
        name = "function_call_arguments"
        yield self._of_item(f"{name}.delta", delta=arguments)
        yield self._of_item(f"{name}.done", name=call.name, arguments=arguments)
        yield self._done()

    def _end(self, completion: Completion) -> dict[str, Any]:
        """The last event: that the answer is whole."""
        choice = self._call.shown(self._message.recorded(completion))
        cut = completion.finish_reason == "length"
        status = "incomplete" if cut else "completed"
        prompt, sampled = len(self._call.prompts[0]), len(completion.token_ids)
        # What training needs; the temperature of the log-probs is 1 where that of sampling is 0.
        hidden = {"index", "message", "logprobs", "finish_reason", "temperature"}
        self._whole |= {name: choice[name] for name in choice.keys() - hidden}
        self._whole |= {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._output,
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": sampled,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + sampled,
            },
            "logprobs_temperature": completion.temperature,
        }
        return self._event(status, response=self._whole)

    def _added(self, item: dict[str, Any]) -> dict[str, Any]:
        self._output.append(item | {"status": "in_progress"})
        return self._event(
            "output_item.added", item=dict(self._output[-1]), output_index=len(self._output) - 1
        )

    def _done(self) -> dict[str, Any]:
        self._output[-1]["status"] = "completed"
        item = dict(self._output[-1])
        return self._event("output_item.done", item=item, output_index=len(self._output) - 1)

    def _of_item(self, name: str, /, **fields: Any) -> dict[str, Any]:
        """An event of the last item."""
        where = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        return self._event(name, **where, **fields)

    def _event(self, name: str, /, **fields: Any) -> dict[str, Any]:
        self._events += 1
        return {"type": f"response.{name}", "sequence_number": self._events - 1, **fields}


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
