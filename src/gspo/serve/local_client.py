"""An OpenAI client whose requests go straight into the app of this process; no socket is opened.

A chat skips HTTP too: its answer is made a `ChatCompletion` as it is. That takes a fifth of the
time of a request, an answer in JSON and openai's own way of reading it. Whatever is not a plain
chat, and whatever fails, goes the long way, so that answers and errors are the same.
"""

from __future__ import annotations

import asyncio
import contextvars
import importlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pydantic
from fastapi import FastAPI
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from openai.types.chat import ChatCompletion

from gspo.core.errors import GspoError, ServeError
from gspo.core.log import log
from gspo.core.variables import holding
from gspo.serve.app import chat_answer
from gspo.serve.refusals import error_response
from gspo.serve.schemas import ChatBody
from gspo.serve.waiting import IN_PROCESS

BASE_URL = "http://gspo.local/v1"
STREAM_MESSAGES = 16
"""Messages of an answer that may wait for their reader; then what makes them waits too."""
_LATE = "the answer took too long"
_CHAT = "/chat/completions"
_OF_CHAT = {"cast_to", "body", "options", "stream_cls"}
"""Arguments of a post that leave it a plain one: no stream, no files."""
_PLAIN = {"extra_json", "timeout", "security"}
"""Options of a request that leave it a plain one: headers or a query of its own don't."""

# httpx, or whatever the client is built on.
_modules = (base.__module__.partition(".")[0] for base in DefaultAsyncHttpxClient.__mro__)
http: Any = importlib.import_module(next(name for name in _modules if name != "openai"))

_failed: contextvars.ContextVar[list[Exception]] = contextvars.ContextVar("gspo_failed")
"""How a chat that skipped HTTP has failed: the app's answer to the next request."""


def in_process_client(app: FastAPI) -> LocalClient:
    """Make a client of the app. It doesn't retry and has no time limit, until it is told."""
    return LocalClient(
        app=app,
        base_url=BASE_URL,
        api_key="gspo",
        max_retries=0,
        timeout=None,
        http_client=DefaultAsyncHttpxClient(transport=_Transport(app)),
    )


class LocalClient(AsyncOpenAI):
    """See the module.

    Args:
        app: what answers; None, if `http_client` leads elsewhere.
        options: those of `AsyncOpenAI`.
    """

    def __init__(self, *, app: FastAPI | None = None, **options: Any):
        super().__init__(**options)
        plain = not options.get("default_headers") and not options.get("default_query")
        self._app = app if plain else None
        self._whole_app = app

    def copy(self, *, _extra_kwargs: Mapping[str, Any] = {}, **changes: Any) -> LocalClient:
        own = changes.get("http_client") in (None, self._client)
        extra = {"app": self._whole_app if own else None, **_extra_kwargs}
        return super().copy(_extra_kwargs=extra, **changes)

    with_options = copy

    async def post(self, path: str, **call: Any) -> Any:
        app, body = self._app, self._chat_body(path, call)
        if app is None or body is None:
            return await super().post(path, **call)
        seconds = call.get("options", {}).get("timeout", self.timeout)
        limit = asyncio.timeout(getattr(seconds, "read", seconds))
        try:
            async with limit:
                answer = await chat_answer(app, body)
        except Exception as error:
            with holding(_failed, [http.ReadTimeout(_LATE) if limit.expired() else error]):
                return await super().post(path, **call)
        return _completion(answer)

    async def request(self, *args: Any, **options: Any) -> Any:
        if self.is_closed():
            raise ServeError("this client was closed, by itself or with the backend that made it")
        return await super().request(*args, **options)

    def _chat_body(self, path: str, call: Mapping[str, Any]) -> ChatBody | None:
        """The body that the app would be sent; None if that is not a plain, right chat."""
        body, options = call.get("body"), call.get("options", {})
        if path != _CHAT or call.get("cast_to") is not ChatCompletion:
            return None
        if any(value for name, value in call.items() if name not in _OF_CHAT):
            return None
        if not isinstance(body, dict) or options.keys() - _PLAIN or self.is_closed():
            return None
        if str(self.base_url).rstrip("/") != BASE_URL:
            return None
        try:
            sent = {**body, **options.get("extra_json", {})}
            # As it comes out of JSON: plain dicts and lists, and nobody else's.
            text = json.dumps(sent, allow_nan=False, ensure_ascii=False)
            asked = json.loads(text.encode())
            return None if asked.get("stream") else ChatBody.model_validate(asked)
        except (TypeError, ValueError, RecursionError):
            return None


def _completion(answer: dict[str, Any]) -> ChatCompletion:
    """What openai makes of an answer. Its validator in Rust takes a twentieth of the time."""
    for choice in answer["choices"]:  # may share a list, such as the prompt's tokens
        choice.update({k: [*value] for k, value in choice.items() if isinstance(value, list)})
    try:
        completion = ChatCompletion.model_validate(answer)
    except pydantic.ValidationError:  # openai reads values that its types don't have too
        completion = ChatCompletion.construct(**answer)
    completion._request_id = None
    return completion


class _Transport(http.AsyncBaseTransport):
    """Carries requests into an app, and its answers out while they are made."""

    def __init__(self, app: FastAPI):
        self._app = app

    async def handle_async_request(self, request: Any) -> Any:
        if failed := _failed.get([]):
            return _failure(failed.pop())
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": request.method,
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "scheme": request.url.scheme,
            "path": request.url.path,
            "raw_path": request.url.raw_path.split(b"?")[0],
            "query_string": request.url.query,
            "server": (request.url.host, request.url.port),
            "client": (IN_PROCESS, 0),
            "root_path": "",
        }
        seconds = request.extensions.get("timeout", {}).get("read")
        body = _Body(self._app, scope, await request.aread(), seconds)
        start = await body.next()
        return http.Response(start["status"], headers=start["headers"], stream=body)


def _failure(error: Exception) -> Any:
    """What the app answers if this is raised in it."""
    if isinstance(error, http.ReadTimeout):
        raise error
    if not isinstance(error, GspoError):
        log.error("a chat failed", exc_info=error)
    answer = error_response(error)
    return http.Response(answer.status_code, headers=answer.raw_headers, content=answer.body)


class _Body(http.AsyncByteStream):
    """An answer that is being made, in a task of its own; `aclose` ends it.

    Args:
        app, scope: see ASGI.
        content: the request's body.
        seconds: most that the next message may take; None: any time.
    """

    def __init__(self, app: FastAPI, scope: dict[str, Any], content: bytes, seconds: float | None):
        self._app, self._scope, self._seconds = app, scope, seconds
        self._body = [{"type": "http.request", "body": content, "more_body": False}]
        self._messages: asyncio.Queue[Any] = asyncio.Queue(STREAM_MESSAGES)
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._receive, self._messages.put)
        except Exception as error:  # the app has answered with it, as far as it could
            log.error("a request failed", exc_info=error)
            await self._messages.put(error)

    async def _receive(self) -> dict[str, Any]:
        if not self._body:
            await asyncio.Event().wait()  # whoever hangs up ends the task
        return self._body.pop()

    async def next(self) -> dict[str, Any]:
        """The next message of the answer.

        Raises:
            Exception: what the app raised.
        """
        try:
            async with asyncio.timeout(self._seconds):
                message = await self._messages.get()
            if isinstance(message, Exception):
                raise message
            return message
        except TimeoutError as error:
            await self.aclose()
            raise http.ReadTimeout(_LATE) from error
        except BaseException:
            await self.aclose()
            raise

    async def __aiter__(self) -> AsyncIterator[bytes]:
        more = True
        while more:
            message = await self.next()
            more = message.get("more_body", False)
            yield message.get("body", b"")

    async def aclose(self) -> None:
        self._task.cancel()
