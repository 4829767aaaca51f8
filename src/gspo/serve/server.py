"""Reach an engine without a port (`in_process_client`), on one (`serve`), or both (`Serving`)."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable

from fastapi import FastAPI

from gspo.core.errors import ConfigError, ServeError
from gspo.serve.app import Find, create_app, one_engine
from gspo.serve.connection import FLUSH_SECONDS, PortServer
from gspo.serve.engine import Engine
from gspo.serve.episodes import Episode
from gspo.serve.guard import is_loopback
from gspo.serve.local_client import in_process_client

START_SECONDS = 60
STOP_SECONDS = 30
"""How long requests that run when the server is stopped may go on."""


def bind(host: str, port: int, api_key: str | None = None) -> socket.socket:
    """Open a listening socket, before any model is loaded.

    Raises:
        ConfigError: others than this machine could reach the address, and there is no key.
        ServeError: the port is in use, or the host is not this machine's.
    """
    if not (api_key or is_loopback(host)):
        raise ConfigError(
            f"host = {host!r}: whoever reaches this machine could use the model. Choose an API key "
            "that requests must bring (GSPO_API_KEY, or --api-key), or listen on 127.0.0.1"
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ServeError(f"cannot listen on {host}: {error.strerror}") from None
    # "::" takes IPv4 too.
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(address, family=family, dualstack_ipv6=both)
    except OSError as error:
        raise ServeError(
            f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}. "
            "Choose another port, or 0 for a free one."
        ) from None


def address(listener: socket.socket) -> str:
    """The base URL of what listens there."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def serve(app: FastAPI, listener: socket.socket, api_key: str | None = None) -> None:
    """Answer requests on `listener` until SIGINT or SIGTERM. Running ones get `STOP_SECONDS` more,
    and are then answered with an error; new ones are refused.

    The signal is then raised again: SIGTERM ends the process.

    Raises:
        KeyboardInterrupt: after SIGINT.
    """
    host = listener.getsockname()[0]
    PortServer(app, host, api_key, STOP_SECONDS).run(sockets=[listener])


class Serving:
    """An engine that answers: to `client`, and on a port too if a listening socket is given.

    A thread with its own event loop answers the port as long as the process lives, whatever becomes
    of the loop that started it.

    Args:
        engine: what samples.
        names: the model names that requests may give.
        listener: see `bind`.
        find: see `create_app`; None: all names are the engine's.

    Attributes:
        url: on the port; without one, a name that only `client` resolves.
    """

    def __init__(
        self,
        engine: Engine,
        names: Callable[[], list[str]],
        listener: socket.socket | None = None,
        find: Find | None = None,
    ):
        self._engine = engine
        self.app = create_app(find or one_engine(engine, names), names)
        self.client = in_process_client(self.app)
        self.url = str(self.client.base_url)
        self._listener = listener
        if listener is not None:  # else not: uvicorn's Config changes the process's logging
            self.url = address(listener)
            host = listener.getsockname()[0]
            self._server = PortServer(self.app, host, None, STOP_SECONDS)
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
                await asyncio.to_thread(self._thread.join, STOP_SECONDS + FLUSH_SECONDS + 5)
            self._listener.close()
        await self.client.close()
        self._engine.close()
        self.app.state.engines.clear()
        await asyncio.sleep(0)  # those that waited are told
