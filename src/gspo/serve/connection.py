"""The server on a port: uvicorn, with limits to what one connection and all of them may hold, and
a stop that lets running requests end."""

from __future__ import annotations

import asyncio
import ctypes
import sys
from functools import cache
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from gspo.serve.guard import HEADER_BYTES, Guard
from gspo.serve.refusals import Refusal, error_response

try:
    import resource
except ImportError:  # not on Windows
    resource = None

MAX_CONNECTIONS = 4096
"""Open at once, if the system lets a process have twice as many files; requests of later ones are
refused (429)."""
SPARE_CONNECTIONS = 64
"""Further connections get a refusal as their answer; any beyond these are closed without one."""
IDLE_SECONDS = 30.0
"""How long a connection may be open without a request that is being answered: the time for the
next head to arrive, and for the last answer to be read."""
QUIET_TICKS = 10
"""Tenths of a second without a request after which memory is given back."""
FLUSH_SECONDS = 2
"""How long the last answers may take to leave when the server stops."""


class Connection(H11Protocol):
    """One client's connection. In h11, whose heads have a greatest size."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # The guard finds these in a request's scope.
        self.app_state = {**self.app_state, "connection": self, "full": False}
        self._end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        beyond = len(self.connections) - _most_connections()
        self.app_state["full"] = beyond > 0
        if beyond > SPARE_CONNECTIONS:
            transport.abort()
        self._clock(True)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._answering():  # else its time runs on: a head may come in drops
            self._clock(False)

    def on_response_complete(self) -> None:
        super().on_response_complete()  # the next request may be here already
        self._clock(not self._answering())

    def connection_lost(self, exc: Exception | None) -> None:
        self._clock(False)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what isn't HTTP, in OpenAI's form."""
        status = getattr(sys.exception(), "error_status_hint", 400)
        answer = error_response(Refusal(status, msg, "bad_request", connection="close"))
        lines = [f"HTTP/1.1 {status} Refused".encode()]
        lines += [name + b": " + value for name, value in answer.raw_headers]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(answer.body)]))
        self.transport.close()

    def abort(self) -> None:
        """Close at once, and drop what isn't read."""
        self.transport.abort()

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _clock(self, runs: bool) -> None:
        """Let the time of a connection that is idle begin, or end it."""
        if self._end is not None:
            self._end.cancel()
        self._end = self.loop.call_later(IDLE_SECONDS, self.abort) if runs else None


@cache
def _most_connections() -> int:
    """How many connections may be open: half of the files that this process may have.

    The process's limit is raised to what `MAX_CONNECTIONS` needs, if the system agrees.
    """
    if resource is None:
        return 256
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = 2 * MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else min(hard, 2 * MAX_CONNECTIONS)
    soft = max(soft, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(MAX_CONNECTIONS, soft // 2)


def _give_back_memory() -> None:
    """Give the system what glibc keeps of memory that was freed. Else a crowd of requests would
    leave the process as large as it has made it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class PortServer(uvicorn.Server):
    """Serves an app on a listening socket.

    Args:
        app: what answers.
        host, api_key: see `Guard`.
        seconds: how long requests that run may go on once it is to stop; new ones are refused.
    """

    def __init__(self, app: ASGIApp, host: str, api_key: str | None, seconds: float):
        self._guard, self._seconds = Guard(app, host, api_key), seconds
        self._quiet = QUIET_TICKS
        config = uvicorn.Config(
            self._guard,
            http=Connection,
            ws="none",
            lifespan="off",
            log_level="warning",
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
        super().__init__(config)

    async def on_tick(self, counter: int) -> bool:
        self._quiet = 0 if self._guard.running else self._quiet + 1
        if self._quiet == QUIET_TICKS:
            await asyncio.to_thread(_give_back_memory)
        if not await super().on_tick(counter):
            return False
        self._guard.stop(self._seconds)
        return self.force_exit or not self._guard.running
