"""Reach an engine without a port (`in_process_client`), on one (`serve`), or both (`Serving`)."""

from __future__ import annotations

import asyncio
import importlib
import socket
import threading
import time
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from gspo.core.errors import ConfigError, ServeError
from gspo.serve.app import IN_PROCESS, create_app
from gspo.serve.engine import Engine
from gspo.serve.episodes import Episode

BASE_URL = "http://gspo.local/v1"
START_SECONDS = 60
STOP_SECONDS = 30
"""How long requests that run when the server is stopped may go on."""


def in_process_client(app: FastAPI) -> AsyncOpenAI:
    """Make an OpenAI client whose requests go straight into the app; no socket is opened."""
    # httpx, or whatever the client is built on.
    modules = (base.__module__.partition(".")[0] for base in DefaultAsyncHttpxClient.__mro__)
    http = importlib.import_module(next(name for name in modules if name != "openai"))
    return AsyncOpenAI(
        base_url=BASE_URL,
        api_key="gspo",
        max_retries=0,
        timeout=None,
        http_client=DefaultAsyncHttpxClient(
            transport=http.ASGITransport(app=app, client=(IN_PROCESS, 0))
        ),
    )


def bind(host: str, port: int) -> socket.socket:
    """Open a listening socket, before any model is loaded.

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


class Serving:
    """An engine that answers: to `client`, and on a port too if a listening socket is given.

    A thread with its own event loop answers the port as long as the process lives, whatever becomes
    of the loop that started it.

    Args:
        engine: what samples.
        names: the model names that requests may give.
        listener: see `bind`.

    Attributes:
        url: on the port; without one, a name that only `client` resolves.
    """

    def __init__(
        self,
        engine: Engine,
        names: Callable[[], list[str]],
        listener: socket.socket | None = None,
    ):
        self.app = create_app(engine, names)
        self.client = in_process_client(self.app)
        self.url = str(self.client.base_url)
        self._listener = listener
        if listener is not None:  # else not: uvicorn's Config changes the process's logging
            host, port = listener.getsockname()[:2]
            self.url = f"http://{host}:{port}/v1"
            self._server = uvicorn.Server(_config(self.app))
            self._thread = threading.Thread(
                target=self._server.run, args=([listener],), name="gspo-server", daemon=True
            )

    async def start(self) -> None:
        """Return once requests are answered. A failure stops all of it.

        Raises:
            ServeError: the server on the port ended, or did not start in time.
        """
        try:
            await self.client.models.list()  # the client looks its platform up, once, in a thread
            if self._listener is not None:
                await self._start_port()
        except BaseException:
            await self.stop()
            raise

    def episode_url(self, episode: Episode) -> str:
        """The base URL at which requests belong to this episode.

        Raises:
            ConfigError: there is no port, or the episode records another model.
        """
        if self._listener is None:
            raise ConfigError(
                "an episode has a base URL only if the model is served on a port: "
                "LocalBackend(port=0), where 0 is a free one"
            )
        self.app.state.episodes.add(episode)
        return f"{self.url.removesuffix('/v1')}/episodes/{episode.id}/v1"

    async def _start_port(self) -> None:
        self._thread.start()
        limit = time.monotonic() + START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > limit:
                raise ServeError(
                    f"the server on {self.url} did not start within {START_SECONDS} s: "
                    "see what it has logged"
                )
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Finish running requests, for `STOP_SECONDS` at most; free the port and the engine."""
        if self._listener is not None:
            self._server.should_exit = True
            if self._thread.is_alive():
                await asyncio.to_thread(self._thread.join, STOP_SECONDS + 5)
            self._listener.close()
        await self.client.close()
        if (engine := self.app.state.engine) is not None:
            engine.close()
        self.app.state.engine = None  # a client may still hold the app
        await asyncio.sleep(0)  # those that waited are told


def _config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app, log_level="warning", lifespan="off", timeout_graceful_shutdown=STOP_SECONDS
    )
