"""Answers as streams: what is certain of a text, pieces of several requests, server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from gspo.core.errors import GspoError
from gspo.core.log import log
from gspo.core.progress import cancelled
from gspo.serve.engine import Engine, Piece, Request, SamplingParams
from gspo.serve.refusals import refusal
from gspo.serve.tool_calls import marks, may_begin

MAX_WAITING = 64
"""Pieces of one answer that may wait for their reader here."""
_UNKNOWN = "\ufffd"  # how decoders write a part of a character


class GrowingText:
    """The text of a completion that is being sampled, as far as it is certain.

    Held back are bytes that may still become a character, and what may still become a stop text.

    >>> from gspo.serve.fake_engine import FakeEngine
    >>> text = GrowingText(FakeEngine(), SamplingParams(stop=("abc",)))
    >>> [text.add([ord(letter)]) for letter in "xaby"]
    ['x', '', '', 'aby']
    """

    def __init__(self, engine: Engine, params: SamplingParams):
        self._engine, self._special = engine, not params.skip_special_tokens
        self._beginnings = marks(frozenset(params.stop))[1]  # of stop texts
        self._tokens: list[int] = []
        # Tokens are decoded from `_start` on, where text that is already out begins: a tokenizer
        # may drop the space before the first token that it decodes. From `_read` on they are new.
        self._start = self._read = 0
        self._held = ""
        self._sent = 0

    def add(self, tokens: Sequence[int]) -> str:
        """Return what became certain with these tokens."""
        self._tokens += tokens
        text = self._decode(self._tokens[self._start :])
        if text.endswith(_UNKNOWN):
            return ""
        new = text[len(self._decode(self._tokens[self._start : self._read])) :]
        if new:
            self._start = self._read
        self._read = len(self._tokens)
        text = self._held + new
        certain = len(text) - may_begin(text, self._beginnings)
        self._held = text[certain:]
        self._sent += certain
        return text[:certain]

    def read(self, piece: Piece) -> str:
        """Return what became certain with a piece: with the last one, all that is left."""
        if piece.completion is None:
            return self.add(piece.token_ids)
        # The engine cuts a text before what ended it, so the last tokens may have no part in it.
        return piece.completion.text[self._sent :]

    def _decode(self, tokens: list[int]) -> str:
        return self._engine.tokenizer.decode(tokens, special=self._special)


async def pieces(
    engine: Engine, requests: Sequence[Request]
) -> AsyncGenerator[tuple[int, Piece], None]:
    """Sample several requests side by side; yields each piece with its request's number.

    Raises:
        GspoError: see `Engine.stream`. The other requests are let go of.
    """
    # Few: while their reader is slow, those of one completion become one (see `MAX_PIECES`).
    box: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue(MAX_WAITING)

    async def pump(number: int, request: Request) -> None:
        try:
            async with aclosing(engine.stream(request)) as stream:
                async for piece in stream:
                    await box.put((number, piece))
            await box.put((number, None))
        except Exception as error:
            await box.put((number, error))

    tasks = [asyncio.create_task(pump(i, request)) for i, request in enumerate(requests)]
    try:
        open_ones = len(tasks)
        while open_ones:
            number, item = await box.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                open_ones -= 1
            else:
                yield number, item
    finally:
        await cancelled(*tasks)


class EventStream(StreamingResponse):
    """Server-sent events. Once the client is gone, or all is sent, the source is closed.

    Args:
        events: bodies to send.
        named: each event goes under its own name (`/v1/responses`). Else `[DONE]` ends them.
    """

    def __init__(self, events: AsyncGenerator[dict[str, Any], None], *, named: bool = False):
        self._wire = _wire(events, named=named)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._wire, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._wire):
            await super().__call__(scope, receive, send)


async def _wire(
    events: AsyncGenerator[dict[str, Any], None], *, named: bool
) -> AsyncGenerator[bytes, None]:
    """Write events as they go over the wire. An error ends them, in OpenAI's shape."""
    try:
        async with aclosing(events):
            async for event in events:
                yield _event(event, named=named)
    except Exception as error:
        if not isinstance(error, GspoError):
            log.exception("a stream failed")
        detail = refusal(error)[1]["error"]
        # Named events have a shape of their own for errors.
        yield _event({**detail, "type": "error"} if named else {"error": detail}, named=named)
        return
    if not named:
        yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any], *, named: bool) -> bytes:
    head = f"event: {body['type']}\n" if named else ""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"{head}data: {text}\n\n".encode(errors="backslashreplace")


async def begun(
    events: AsyncGenerator[dict[str, Any], None],
) -> AsyncGenerator[dict[str, Any], None]:
    """Wait for the first event, so that what is refused is refused before the answer begins.

    Raises:
        GspoError: that of the first event.
    """
    first = await anext(events)

    async def all_of_them() -> AsyncGenerator[dict[str, Any], None]:
        async with aclosing(events):
            yield first
            async for event in events:
                yield event

    return all_of_them()
