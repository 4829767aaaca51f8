"""What the handler of a request waits for: its tokens, its completions, or its client to leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import fastapi

from gspo.core.errors import RequestError
from gspo.core.progress import all_or_cancel
from gspo.serve.engine import Completion, Engine, Request
from gspo.serve.messages import check_whole_characters
from gspo.serve.refusals import HUNG_UP, Refusal

T = TypeVar("T")
IN_PROCESS = "in-process"
"""The client's host in requests that come through no socket."""
LONG_TEXT = 10_000
"""Characters. Longer texts are tokenized in a thread, so that others don't wait."""


def _in_process(http: fastapi.Request | None) -> bool:
    return http is None or (http.client is not None and http.client.host == IN_PROCESS)


async def tokenized(
    http: fastapi.Request | None, engine: Engine, texts: Sequence[str], encode: Callable[[], T]
) -> T:
    """Tokenize `texts` by `encode`, unless they cannot fit into the context anyway.

    Raises:
        RequestError: they are too long, or no text.
    """
    for text in texts:
        if len(text) > engine.tokenizer.most_characters:
            raise RequestError(
                f"a text of {len(text)} characters cannot fit: the model's context holds "
                f"{engine.tokenizer.most_characters} at most",
                "prompt",
            )
    check_whole_characters(texts)
    return await aside(http, encode, sum(map(len, texts)) >= LONG_TEXT)


async def aside(http: fastapi.Request | None, work: Callable[[], T], long: bool) -> T:
    """Do what may take `long` in a thread, so that others don't wait.

    In process nobody else waits in this loop; and threads would join requests to batches in another
    order each time.
    """
    if _in_process(http) or not long:
        return work()
    return await asyncio.to_thread(work)


async def together(engine: Engine, requests: Sequence[Request]) -> list[list[Completion]]:
    """Sample several requests; if one fails, the others are let go of."""
    if len(requests) == 1:
        return [await engine.complete(requests[0])]
    for request in requests:  # all of them, before the first is sampled
        engine.check(request)
    return await all_or_cancel([engine.complete(request) for request in requests])


async def unless_gone(http: fastapi.Request, coroutine: Coroutine[Any, Any, T]) -> T:
    """Await what is to be answered, unless the client hangs up.

    Raises:
        Refusal: it did.
    """
    if _in_process(http):  # its client cancels this task itself
        return await coroutine
    work = asyncio.ensure_future(coroutine)
    # The body is read: the next message is that the client is gone.
    gone = asyncio.ensure_future(http.receive())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Refusal(HUNG_UP, "the client hung up")
        return work.result()
    finally:
        gone.cancel()
        work.cancel()
