"""Reach the app without a port (`in_process_client`) or on one (`serve`)."""

from __future__ import annotations

import asyncio
import importlib
import socket
import threading
import time
from typing import Any

import uvicorn
from fastapi import FastAPI
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from gspo.core.errors import ServeError

BASE_URL = "http://gspo.local/v1"
START_SECONDS = 60
STOP_SECONDS = 30
"""How long requests that run when the server is stopped may go on."""


def in_process_client(app: FastAPI) -> AsyncOpenAI:
    """An OpenAI client whose requests go straight into the app; no socket is opened."""
    http = _http_library()
    transport = http.ASGITransport(app=app)
    return AsyncOpenAI(
        base_url=BASE_URL,
        api_key="gspo",
        max_retries=0,
        timeout=None,
        http_client=DefaultAsyncHttpxClient(transport=transport),
    )


def _http_library() -> Any:
    """httpx, or its successor httpx2 that openai 3 is built on: the client's own."""
    for base in DefaultAsyncHttpxClient.__mro__:
        root = base.__module__.partition(".")[0]
        if root in ("httpx", "httpx2"):
            return importlib.import_module(root)
    raise ServeError("openai's HTTP client is built on neither httpx nor httpx2")


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, taken before any model is loaded.

    Raises:
        ServeError: the port is in use, or the host is not this machine's.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ServeError(
            f"cannot listen on {host}:{port}: {error.strerror}. "
            "Choose another port, or 0 for a free one."
        ) from None
    return listener


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Answer requests on `listener` until SIGINT or SIGTERM, and running ones `STOP_SECONDS` more.

    The signal is then raised again: SIGTERM ends the process.

    Raises:
        KeyboardInterrupt: after SIGINT.
    """
    uvicorn.Server(_config(app)).run(sockets=[listener])


class PortServer:
    """The app on a listening socket, answered in a thread and an event loop of its own.

    So it answers as long as the process lives, whatever becomes of the loop that started it.
    """

    def __init__(self, app: FastAPI, listener: socket.socket):
        self._listener = listener
        self._server = uvicorn.Server(_config(app))
        self._thread = threading.Thread(
            target=self._server.run,
            kwargs={"sockets": [listener]},
            name="gspo-server",
            daemon=True,
        )
        bound = self._listener.getsockname()
        self.url = f"http://{bound[0]}:{bound[1]}/v1"

    async def start(self) -> None:
        """Return once requests are answered.

        Raises:
            ServeError: the server ended, or did not start in time.
        """
        self._thread.start()
        limit = time.monotonic() + START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > limit:
                await self.stop()
                raise ServeError(
                    f"the server on {self.url} did not start within {START_SECONDS} s: "
                    "see what it has logged"
                )
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Finish running requests, for `STOP_SECONDS` at most, and free the port."""
        self._server.should_exit = True
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, STOP_SECONDS + 5)
        self._listener.close()


def _config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app, log_level="warning", lifespan="off", timeout_graceful_shutdown=STOP_SECONDS
    )
