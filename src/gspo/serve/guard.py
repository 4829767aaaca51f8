"""What stands between the sockets and the app: what a stranger may send, and for how long.

Requests of this process's own clients don't come through here.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gspo.serve.refusals import Refusal, error_response

MAX_HEADERS = 100
HEADER_BYTES = 32 * 2**10
"""All headers of a request together."""
BODY_BYTES = 16 * 2**20
"""Largest body of a request."""
BODY_SECONDS = 60.0
"""How long a body may take to arrive."""
HELD_BYTES = 256 * 2**20
"""Bodies that are in hand at once, all together."""
SEND_SECONDS = 60.0
"""How long a client may leave a part of its answer unread."""
PART_BYTES = 64 * 2**10
"""An answer is sent in parts of so many bytes: what a client that doesn't read can hold."""
OPEN_PATHS = {"/health"}
"""They tell nothing, and need no key."""

LOOPBACK = {"localhost", "127.0.0.1", "[::1]"}
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^:/@\[\]\s]+?)\.?(?::\d{1,5})?")


class Guard:
    """An ASGI app that stands before another one, and refuses what must not reach it.

    Args:
        app: what answers.
        host: the address that the server listens on. On loopback, the `Host` and the `Origin` of
            a request must name it, so that no page in a browser reaches the server under a name of
            its own; elsewhere the key is what protects it.
        api_key: what each request must bring; None: nothing.

    Attributes:
        running: time limits of the requests that are being answered.
    """

    def __init__(self, app: ASGIApp, host: str, api_key: str | None = None):
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._names = LOOPBACK | {host.lower()} if is_loopback(host) else None
        self.running: set[asyncio.Timeout] = set()
        self._stopping = False
        self._held = 0

    def stop(self, seconds: float) -> None:
        """Refuse new requests, and end those that run after `seconds`. In the event loop."""
        if not self._stopping:
            self._stopping = True
            for limit in self.running:
                limit.reschedule(asyncio.get_running_loop().time() + seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        answer, limit = _Answer(send), asyncio.timeout(None)
        try:
            self._check(scope)
            async with limit:
                self.running.add(limit)
                try:
                    await self._answer(scope, receive, answer)
                finally:
                    self.running.discard(limit)
        except Refusal as refusal:
            await answer.refuse(refusal, scope, receive)
        except Exception:
            if not answer.late and not limit.expired():
                raise
            message = "the server stops, and this request has not ended in time"
            refusal = Refusal(503, message, "server_stopping", connection="close")
            await answer.refuse(refusal, scope, receive)
        if not answer.ended and (connection := scope.get("state", {}).get("connection")):
            connection.abort()  # a part of an answer must not look like a whole one
            await asyncio.sleep(0)  # it is closed then

    def _check(self, scope: Scope) -> None:
        """Refuse a request by what its head says."""
        if self._stopping:
            raise Refusal(503, "the server stops", "server_stopping", connection="close")
        if scope.get("state", {}).get("full"):
            message = "too many connections are open: send this request again later"
            raise Refusal(429, message, "too_many_connections", connection="close")
        headers = scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > MAX_HEADERS or size > HEADER_BYTES:
            raise Refusal(
                431,
                f"{len(headers)} headers of {size} bytes: at most {MAX_HEADERS} of {HEADER_BYTES}",
                "headers_too_large",
            )
        sent = {name: value.decode("latin-1") for name, value in headers}
        self._check_names(sent)
        scheme, _, key = sent.get(b"authorization", "").partition(" ")
        if self._key is not None and scope["path"] not in OPEN_PATHS:
            same = hmac.compare_digest(key.strip(" ").encode("latin-1"), self._key)
            if not same or scheme.lower() != "bearer":
                what = "a wrong API key" if key else "no API key"
                message = f"{what}: send 'Authorization: Bearer <key>' with the server's key"
                raise Refusal(401, message, "invalid_api_key", www_authenticate="Bearer")

    def _check_names(self, sent: dict[bytes, str]) -> None:
        """Refuse a `Host` or an `Origin` that isn't this server's."""
        host = _HOST.fullmatch(sent.get(b"host", "").lower())
        if host is None:
            raise Refusal(400, "the header Host is missing or no host's name", "bad_host")
        if self._names is None:
            return
        if host["name"] not in self._names:
            message = (
                f"the header Host is {sent[b'host']!r}, but this server listens on loopback and "
                f"answers as {', '.join(sorted(self._names))} only"
            )
            raise Refusal(421, message, "wrong_host")
        origin = sent.get(b"origin")
        if origin is not None:
            page = _HOST.fullmatch(origin.lower().partition("://")[2])
            if page is None or page["name"] not in self._names:
                message = f"a page of {origin!r} asks: only pages of loopback may"
                raise Refusal(403, message, "wrong_origin")

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        """Read the body whole, and let the app answer."""
        body = bytearray()
        try:
            if not await self._read(scope, receive, body):
                answer.ended = True  # nobody is there any more
                return
            whole = [{"type": "http.request", "body": bytes(body), "more_body": False}]

            async def replay() -> Message:
                return whole.pop() if whole else await receive()

            await self._app(scope, replay, answer.send)
        finally:
            self._held -= len(body)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> bool:
        """Read the request's body; False if the client hung up."""
        told = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = Refusal(413, f"the body has more than {BODY_BYTES} bytes", "body_too_large")
        if int(told) > BODY_BYTES:
            raise too_large
        try:
            async with asyncio.timeout(BODY_SECONDS):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    part, more = message.get("body", b""), message.get("more_body", False)
                    body += part
                    self._held += len(part)
                    if len(body) > BODY_BYTES:
                        raise too_large
                    if self._held > HELD_BYTES:
                        raise Refusal(
                            429, "too many large requests at once: send this one again later"
                        )
        except TimeoutError:
            message = f"the body has not arrived within {BODY_SECONDS:g} s"
            raise Refusal(408, message, "body_too_slow", connection="close") from None
        return True


class _Answer:
    """An answer on its way to a client that may be slow to read it.

    Attributes:
        late: the client has left a part of it unread for too long.
        ended: its last part is sent.
    """

    def __init__(self, send: Send):
        self._send = send
        self._started = self.late = self.ended = False

    async def send(self, message: Message) -> None:
        """Send a message of the app, a body in parts: before each, the last one must be read."""
        body, more = message.get("body", b""), message.get("more_body", False)
        try:
            async with asyncio.timeout(SEND_SECONDS) as limit:
                while len(body) > PART_BYTES:
                    part, body = body[:PART_BYTES], body[PART_BYTES:]
                    await self._send({**message, "body": part, "more_body": True})
                    limit.reschedule(asyncio.get_running_loop().time() + SEND_SECONDS)
                await self._send({**message, "body": body} if "body" in message else message)
        except TimeoutError:
            self.late = True
            raise
        self._started = True
        self.ended = message["type"] == "http.response.body" and not more

    async def refuse(self, refusal: Refusal, scope: Scope, receive: Receive) -> None:
        """Answer with an error, if nothing is sent yet."""
        if not self._started:
            await error_response(refusal)(scope, receive, self._send)
            self.ended = True


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address.

    >>> [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "")]
    [True, True, True, False, False]
    """
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
