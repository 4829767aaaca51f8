"""The port: it answers whatever event loop runs, and is freed when it is stopped."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest
from openai import APIStatusError, AsyncOpenAI, AuthenticationError

from gspo.core.errors import ConfigError, ServeError
from gspo.serve import server as module
from gspo.serve.connection import PortServer
from gspo.serve.fake_engine import FakeEngine
from gspo.serve.local_client import in_process_client
from gspo.serve.server import Serving, bind
from support import app_of

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


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1"])
def test_a_port_that_others_reach_needs_a_key(host: str):
    for key in (None, ""):
        with pytest.raises(ConfigError, match="whoever reaches this machine could use the model"):
            bind(host, 0, key)
    if host == "0.0.0.0":
        bind(host, 0, "key").close()


def test_a_host_that_is_not_this_machines_is_named():
    with pytest.raises(ServeError, match=r"cannot listen on 192\.0\.2\.1:0: Cannot assign"):
        bind("192.0.2.1", 0, "key")


async def test_a_port_has_its_key_and_its_limits():
    listener = bind("0.0.0.0", 0, "secret")
    server = PortServer(app_of(FakeEngine()), "0.0.0.0", "secret", 1)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    async with AsyncOpenAI(base_url=url, api_key="secret") as client:
        request = client.chat.completions.create(model="m", messages=HELLO, n=2)
        assert len((await request).choices) == 2
        with pytest.raises(AuthenticationError, match="a wrong API key"):
            await client.with_options(api_key="guess").models.list()
        with pytest.raises(APIStatusError, match="the body has more than") as refused:
            await client.completions.create(model="m", prompt="x" * 17_000_000)
        assert refused.value.status_code == 413
    server.should_exit = True
    await asyncio.to_thread(thread.join, 10)
    assert not thread.is_alive()
