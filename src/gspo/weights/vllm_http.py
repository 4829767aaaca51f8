"""One request to a vLLM server: an answer in time, or an error that says what became of it."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

import httpx

from gspo.core.errors import RequestError, ServeError

AGAIN_SECONDS, BUSY_SECONDS = 1.0, 60.0
"""For how long a server that has failed is asked again; one that says it is busy (Retry-After)."""


class ServerFault(ServeError):
    """A server is dead, hangs, or was started again. Another, or a later try, may do."""


def client(url: str) -> httpx.AsyncClient:
    """What asks a server. `call` has the limits of time."""
    # A connection each: vLLM closes those that nobody uses, and to use one at that moment looks
    # as if the server had died.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    safe = url.startswith("https:")  # certificates take a while to be read
    return httpx.AsyncClient(limits=limits, timeout=None, trust_env=False, verify=safe)


async def call(http: httpx.AsyncClient, url: str, body: Any, seconds: float) -> Any:
    """What is answered to a POST of `body`, or to a GET without one.

    Raises:
        ServerFault: no answer in time, or an error of the server.
        RequestError: it refuses what was asked, or has no such route.
    """
    ask = partial(http.request, "GET" if body is None else "POST", url, json=body)
    began = time.monotonic()
    try:
        async with asyncio.timeout(seconds):  # httpx limits single reads, not the whole
            answer = await ask()
            while pause := _pause(answer, time.monotonic() - began):
                await asyncio.sleep(pause)
                answer = await ask()
    except httpx.ConnectError:
        raise ServerFault(
            f"nothing answers at {url}: start vLLM there, or give the Python that starts it in "
            "place of its URL (docs/vllm.md)"
        ) from None
    except (httpx.HTTPError, TimeoutError) as error:
        late = isinstance(error, TimeoutError) and f"no answer within {seconds:g} s"
        raise ServerFault(f"{url}: {late or repr(error)}") from None
    if answer.status_code != 200:
        refused = answer.status_code in (400, 401, 403, 404, 413, 422)
        kind = RequestError if refused else ServerFault
        raise kind(f"{url}: HTTP {answer.status_code}: {answer.text[:500]}")
    try:
        return answer.json() if "json" in answer.headers.get("content-type", "") else None
    except (ValueError, RecursionError):
        raise ServerFault(f"{url}: no JSON: {answer.text[:200]!r}") from None


def _pause(answer: httpx.Response, seconds: float) -> float:
    """Seconds after which to ask again, so many after the first time; 0: not at all.

    A server that is busy, or a proxy before it, says when. Another error may be one of the proxy.
    """
    told, pause, most = answer.headers.get("retry-after", ""), 0.3, AGAIN_SECONDS
    if answer.status_code in (429, 503) and told.isdecimal():
        pause, most = max(float(told), 0.1), BUSY_SECONDS
    elif answer.status_code < 500:
        return 0.0
    return pause if seconds + pause < most else 0.0
