"""Limits of connections and the stop, over real sockets of loopback."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import fastapi
import pytest
from fastapi.responses import StreamingResponse

from gspo.serve import connection as module
from gspo.serve import guard as limits
from gspo.serve.connection import PortServer
from gspo.serve.server import address, bind

HEAD = b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Site:
    """An app with a quick page, one that waits, one that is long, and one that never ends."""

    def __init__(self) -> None:
        self.app, self.made, self.ended = fastapi.FastAPI(), 0, 0
        for page in (self.quick, self.waits, self.long, self.endless):
            self.app.get(f"/{page.__name__}")(page)

    async def quick(self) -> str:
        return "quick"

    async def waits(self) -> str:
        await asyncio.sleep(0.4)
        return "waited"

    async def long(self) -> str:
        return "x" * 20_000_000

    async def endless(self) -> StreamingResponse:
        async def make() -> AsyncIterator[str]:
            try:
                while True:
                    self.made += 1
                    yield "x" * 4096
            finally:
                self.ended += 1

        return StreamingResponse(make())


@asynccontextmanager
async def served(app: Any, seconds: float = 1.0) -> AsyncIterator[tuple[PortServer, int]]:
    """The app on a port, in this event loop."""
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    assert address(listener) == f"http://127.0.0.1:{port}/v1"
    server = PortServer(app, "127.0.0.1", None, seconds)
    task = asyncio.ensure_future(server._serve([listener]))
    while not server.started:
        await asyncio.sleep(0.001)
    yield server, port
    server.should_exit = True
    await asyncio.wait_for(task, seconds + module.FLUSH_SECONDS + 5)


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    lines = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
    return int(head.split()[1]), await reader.readexactly(int(lines[0].split()[1]))


async def until(condition: Any, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_what_is_not_http_is_refused_in_openais_form():
    async with served(Site().app) as (_, port):
        for sent, status in (
            (b"nonsense\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
            (b"GET / HTTP/1.1\r\na: " + b"b" * 70_000, 431),
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            got, body = await read_answer(reader)
            assert (got, json.loads(body)["error"]["code"]) == (status, "bad_request")
            assert await reader.read() == b""  # and closed
            writer.close()


async def test_who_sends_no_whole_head_is_closed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.2)
    async with served(Site().app) as (server, port):
        for beginning in (b"", b"GET /qu", HEAD % b"quick" + b"GET /"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(beginning)
            if b"quick" in beginning:
                assert (await read_answer(reader))[0] == 200
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(1), 5)
            writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD % b"waits")  # longer than that: it is being answered
        assert await read_answer(reader) == (200, b'"waited"')
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD % b"quick" + HEAD % b"waits")  # at once, one behind the other
        assert await read_answer(reader) == (200, b'"quick"')
        assert await read_answer(reader) == (200, b'"waited"')
        writer.close()
        await until(lambda: not server.server_state.connections)


async def test_more_connections_than_there_are_places(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_most_connections", lambda: 2)
    monkeypatch.setattr(module, "SPARE_CONNECTIONS", 1)
    async with served(Site().app) as (server, port):
        opened = []
        for status in (200, 200, 429):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            opened.append(writer)
            writer.write(HEAD % b"quick")
            assert (await read_answer(reader))[0] == status
        await until(lambda: len(server.server_state.connections) == 2)  # the refused one is closed
        for writer in opened:
            writer.close()
        await until(lambda: not server.server_state.connections)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD % b"quick")
        assert (await read_answer(reader))[0] == 200
        writer.close()


async def test_who_does_not_read_holds_little_and_not_for_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "SEND_SECONDS", 0.3)
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.3)
    site = Site()
    async with served(site.app) as (server, port):
        for page in (b"endless", b"long"):
            with socket.socket() as deaf:
                deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                deaf.setblocking(False)
                await asyncio.get_running_loop().sock_connect(deaf, ("127.0.0.1", port))
                deaf.sendall(HEAD % page)
                await asyncio.sleep(0.05)
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(HEAD % b"quick")  # others are answered meanwhile
                assert (await read_answer(reader))[0] == 200
                writer.close()
                await until(lambda: not server.server_state.connections)
                await until(lambda: not server.server_state.tasks)
    assert site.made < 4096  # 16 MB: the system's own buffers are a part of it


async def test_a_stop_lets_running_requests_end_and_refuses_new_ones():
    async with served(Site().app) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD % b"waits")
        await asyncio.sleep(0.05)
        server.should_exit = True
        await until(lambda: server._guard._stopping)
        late, later = await asyncio.open_connection("127.0.0.1", port)
        later.write(HEAD % b"quick")
        status, body = await read_answer(late)
        assert (status, json.loads(body)["error"]["code"]) == (503, "server_stopping")
        assert await read_answer(reader) == (200, b'"waited"')
        writer.close()
        later.close()


async def test_what_has_not_ended_in_time_is_answered_with_an_error():
    async with served(Site().app, seconds=0.1) as (server, port):
        plain, to_plain = await asyncio.open_connection("127.0.0.1", port)
        to_plain.write(HEAD % b"waits")
        stream, to_stream = await asyncio.open_connection("127.0.0.1", port)
        to_stream.write(HEAD % b"endless")
        assert await stream.readexactly(1000)
        server.should_exit = True
        status, body = await read_answer(plain)
        assert (status, json.loads(body)["error"]["code"]) == (503, "server_stopping")
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            while True:  # a stream breaks off: it doesn't look as if it had ended
                await stream.readexactly(100_000)
        to_plain.close()
        to_stream.close()
