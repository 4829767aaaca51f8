"""What never reaches the app: bodies, heads, names and keys that are not right."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from gspo.serve import guard as module
from gspo.serve.guard import Guard, is_loopback

Asked = list[tuple[str, bytes]]


class Connection:
    aborted = False

    def abort(self) -> None:
        self.aborted = True


class Called:
    """An app that says what it was sent; and one request to the guard before it."""

    def __init__(self, *, parts: tuple[bytes, ...] = (b"{}",), answer: bytes = b"fine"):
        self.parts, self.answer = [*parts], answer
        self.got: Asked = []
        self.sent: list[dict[str, Any]] = []
        self.connection = Connection()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        assert not message["more_body"]
        self.got.append((scope["path"], message["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": self.answer})

    async def receive(self) -> dict[str, Any]:
        if not self.parts:
            await asyncio.sleep(60)
        body = self.parts.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(self.parts)}

    async def send(self, message: Message) -> None:
        self.sent.append({**message})

    async def ask(
        self, guard: Guard, path: str = "/v1/models", full: bool = False, **headers: str
    ) -> tuple[int, Any]:
        """The status, and what the error says."""
        named = {"host": "localhost:8000", **headers}
        raw = [(k.replace("_", "-").encode(), v.encode("latin-1")) for k, v in named.items() if v]
        state = {"connection": self.connection, "full": full}
        scope = {"type": "http", "path": path, "headers": raw, "state": state}
        await guard(scope, self.receive, self.send)
        body = b"".join(m.get("body", b"") for m in self.sent)
        status = self.sent[0]["status"] if self.sent else 0
        if status == 200:
            return status, body
        detail = json.loads(body)["error"]
        assert set(detail) == {"message", "type", "param", "code"}
        assert dict(self.sent[0]["headers"])[b"content-length"] == str(len(body)).encode()
        return status, detail


async def ask(
    listens: str = "127.0.0.1",
    key: str | None = None,
    path: str = "/v1/models",
    *,
    full: bool = False,
    **headers: str,
) -> tuple[int, Any]:
    app = Called()
    status, told = await app.ask(Guard(app, listens, key), path, full, **headers)
    assert bool(app.got) == (status == 200)
    return status, told


@pytest.mark.parametrize(
    ("listens", "named", "status"),
    [
        ("127.0.0.1", "localhost", 200),
        ("127.0.0.1", "127.0.0.1:8000", 200),
        ("127.0.0.1", "[::1]:8000", 200),
        ("127.0.0.1", "LocalHost.:80", 200),
        ("127.0.0.3", "127.0.0.3", 200),
        ("127.0.0.1", "127.0.0.3", 421),
        ("127.0.0.1", "evil.example:8000", 421),
        ("127.0.0.1", "localhost.evil.example", 421),
        ("127.0.0.1", "evil@localhost", 400),
        ("127.0.0.1", "localhost:port", 400),
        ("127.0.0.1", "", 400),
        ("0.0.0.0", "gpu1.lan:8000", 200),
        ("0.0.0.0", "", 400),
    ],
)
async def test_on_loopback_a_request_names_loopback(listens: str, named: str, status: int):
    assert (await ask(listens, host=named))[0] == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("https://evil.example", 403),
        ("null", 403),
        ("http://localhost@evil.example", 403),
    ],
)
async def test_no_page_of_elsewhere_asks(origin: str, status: int):
    assert (await ask(origin=origin))[0] == status


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ("Bearer right", 200),
        ("bearer  right", 200),
        ("Bearer wrong", 401),
        ("Bearer right2", 401),
        ("Basic right", 401),
        ("Bearer \xff", 401),
        ("right", 401),
        ("", 401),
    ],
)
async def test_the_key_is_asked_for(sent: str, status: int):
    told = await ask(key="right", authorization=sent)
    assert told[0] == status
    if status == 401:
        assert told[1]["code"] == "invalid_api_key" and "right" not in told[1]["message"]
    assert (await ask(key="right", authorization=sent, path="/health"))[0] == 200


async def test_a_refusal_says_how_to_authenticate():
    app = Called()
    await app.ask(Guard(app, "127.0.0.1", "key"))
    assert (b"www-authenticate", b"Bearer") in app.sent[0]["headers"]


def many(count: int) -> Any:
    """So many headers."""
    return {f"a{i}": "b" for i in range(count)}


async def test_heads_have_a_size():
    assert (await ask(**many(99)))[0] == 200
    assert (await ask(**many(100)))[0] == 431
    assert (await ask(a="b" * module.HEADER_BYTES))[0] == 431


async def test_a_server_without_a_free_place_says_so():
    status, told = await ask(full=True)
    assert (status, told["type"]) == (429, "rate_limit_error")


@given(parts=st.lists(st.binary(max_size=9), min_size=1, max_size=6), told=st.booleans())
def test_a_body_has_a_size(parts: list[bytes], told: bool):
    whole = b"".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BODY_BYTES", 20)
        app = Called(parts=tuple(parts))
        guard = Guard(app, "127.0.0.1")
        length = str(len(whole)) if told else ""
        status, _ = asyncio.run(app.ask(guard, content_length=length))
    if len(whole) <= 20:
        assert (status, app.got) == (200, [("/v1/models", whole)])
    else:
        assert (status, app.got) == (413, [])
        if told:
            assert len(app.parts) == len(parts)  # refused before anything was read
    assert (guard._held, guard.running) == (0, set())


async def test_a_body_that_does_not_tell_its_size_is_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BODY_BYTES", 20)
    for size, status in ((20, 200), (21, 413)):
        app = Called(parts=(b"x" * 10, b"x" * (size - 10)))
        assert (await app.ask(Guard(app, "127.0.0.1")))[0] == status


async def test_all_bodies_together_have_a_size(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "HELD_BYTES", 10)
    holds, go_on = Called(parts=(b"123456",)), asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await go_on.wait()
        await holds(scope, receive, send)

    guard = Guard(slow, "127.0.0.1")
    first = asyncio.ensure_future(holds.ask(guard))
    await asyncio.sleep(0)
    status, _ = await (second := Called(parts=(b"12345",))).ask(guard)
    assert status == 429 and (b"retry-after", b"1") in second.sent[0]["headers"]
    go_on.set()
    assert (await first)[0] == 200
    assert guard._held == 0


async def test_a_body_has_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BODY_SECONDS", 0.02)
    app = Called(parts=())
    status, _ = await app.ask(Guard(app, "127.0.0.1"))
    assert status == 408 and (b"connection", b"close") in app.sent[0]["headers"]


async def test_who_hangs_up_in_the_midst_of_a_body_is_no_error():
    class Gone(Called):
        async def receive(self) -> dict[str, Any]:
            return {"type": "http.disconnect"}

    app = Gone()
    guard = Guard(app, "127.0.0.1")
    scope = {"type": "http", "path": "/", "headers": [(b"host", b"localhost")]}
    await guard(scope, app.receive, app.send)
    assert (app.sent, app.got, guard.running) == ([], [], set())


async def test_who_does_not_read_is_let_go(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SEND_SECONDS", 0.02)
    answer = b"x" * (3 * module.PART_BYTES + 5)

    class Deaf(Called):
        async def send(self, message: Message) -> None:
            if len(self.sent) == 3:
                await asyncio.sleep(60)
            await super().send(message)

    deaf = Deaf(answer=answer)
    guard = Guard(deaf, "127.0.0.1")
    await asyncio.wait_for(deaf.ask(guard), 5)
    assert deaf.connection.aborted and not guard.running
    assert max(len(m.get("body", b"")) for m in deaf.sent) == module.PART_BYTES
    good = Called(answer=answer)
    assert await good.ask(Guard(good, "127.0.0.1")) == (200, answer)
    assert not good.connection.aborted


async def test_who_reads_slowly_but_reads_is_not_let_go(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SEND_SECONDS", 0.6)
    answer = b"x" * (4 * module.PART_BYTES)

    class Slow(Called):
        async def send(self, message: Message) -> None:
            await asyncio.sleep(0.2)
            await super().send(message)

    slow = Slow(answer=answer)
    assert await slow.ask(Guard(slow, "127.0.0.1")) == (200, answer)


@pytest.mark.parametrize("streams", [False, True])
async def test_a_stop_refuses_new_requests_and_ends_old_ones(streams: bool):
    ended = []

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        try:
            if streams:
                await send({"type": "http.response.start", "status": 200, "headers": []})
            await asyncio.sleep(60)
        finally:
            ended.append(scope["path"])

    guard = Guard(endless, "127.0.0.1")
    old, new = Called(), Called()
    scope: Any = {"type": "http", "path": "/", "headers": [(b"host", b"localhost")]}
    scope |= {"state": {"connection": old.connection}}
    task = asyncio.ensure_future(guard(scope, old.receive, old.send))
    await asyncio.sleep(0.01)
    guard.stop(0.1)
    guard.stop(99)  # counts from the first
    status, told = await new.ask(guard)
    assert (status, told["code"], ended) == (503, "server_stopping", [])
    await asyncio.wait_for(task, 5)
    assert ended and not guard.running
    assert old.connection.aborted == streams
    assert old.sent[0]["status"] == (200 if streams else 503)


async def test_a_fault_of_the_app_is_not_hidden():
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        await Called().ask(Guard(broken, "127.0.0.1"))


@pytest.mark.parametrize(
    ("host", "is_one"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True)]
    + [(host, False) for host in ("0.0.0.0", "::", "", "192.168.1.5", "localhost.evil", "gpu1")],
)
def test_loopback_is_told_from_the_rest(host: str, is_one: bool):
    assert is_loopback(host) == is_one
