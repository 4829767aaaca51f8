"""The port: it answers whatever event loop runs, and is freed when it is stopped."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from openai import AsyncOpenAI

from gspo.core.errors import ServeError
from gspo.serve import server as module
from gspo.serve.fake_engine import FakeEngine
from gspo.serve.server import Serving, bind, in_process_client

HELLO: Any = [{"role": "user", "content": "hello"}]


async def ask(client: AsyncOpenAI) -> int:
    async with client:
        request = client.chat.completions.create(model="m", messages=HELLO, n=2)
        return len((await asyncio.wait_for(request, 30)).choices)


def test_it_outlives_the_loop_that_started_it():
    server = Serving(FakeEngine(), lambda: ["m"], bind("127.0.0.1", 0))
    port = int(server.url.split(":")[2].split("/")[0])
    asyncio.run(server.start())
    for _ in range(2):
        assert asyncio.run(ask(AsyncOpenAI(base_url=server.url, api_key="x"))) == 2
        assert asyncio.run(ask(in_process_client(server.app))) == 2
    asyncio.run(server.stop())
    bind("127.0.0.1", port).close()  # the port is free again


async def test_a_server_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch):
    server = Serving(FakeEngine(), lambda: ["m"], bind("127.0.0.1", 0))
    monkeypatch.setattr(server._thread, "_target", lambda sockets: None)
    with pytest.raises(ServeError, match=r"127\.0\.0\.1:\d+/v1 did not start"):
        await asyncio.wait_for(server.start(), 20)


async def test_a_client_that_holds_on_does_not_hold_up_the_stop(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "STOP_SECONDS", 1)
    server = Serving(FakeEngine(), lambda: ["m"], bind("127.0.0.1", 0))

    @server.app.get("/slow")
    async def slow() -> None:
        await asyncio.sleep(60)

    await server.start()
    host, port = server.url.split("/")[2].split(":")
    with socket.create_connection((host, int(port))) as held:
        held.sendall(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await asyncio.sleep(0.1)
        await asyncio.wait_for(server.stop(), 20)
