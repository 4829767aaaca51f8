"""The client without a port: a chat that skips HTTP has the answer and the errors of one that
doesn't."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import fastapi
import openai
import pytest
from fastapi.responses import StreamingResponse
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI
from pydantic import BaseModel

from gspo.core.errors import BusyError, RequestError, ServeError
from gspo.serve import local_client as module
from gspo.serve.engine import Completion, Request
from gspo.serve.episodes import Episode, recording
from gspo.serve.fake_engine import FakeEngine
from gspo.serve.local_client import LocalClient, in_process_client
from support import app_of

HELLO: Any = [{"role": "user", "content": "hello"}]


class Failing(FakeEngine):
    """Fails as it is told."""

    error: BaseException | None = None

    async def complete(self, request: Request) -> list[Completion]:
        answer = await super().complete(request)
        if self.error is not None:
            raise self.error
        return answer


class ByHttp(LocalClient):
    """The same client, that skips nothing."""

    def _chat_body(self, *_: Any, **__: Any) -> None:
        return None


def client_of(engine: FakeEngine, kind: type[LocalClient] = LocalClient) -> LocalClient:
    made = in_process_client(app_of(engine))
    made.__class__ = kind
    return made


def comparable(answer: Any) -> Any:
    """All of an answer but its number and its time; of an error, all that a caller can read."""
    if isinstance(answer, openai.APIStatusError):
        headers = answer.response.headers
        body = (answer.body, answer.status_code, headers.get("retry-after"))
        return type(answer), str(answer), body, str(answer.request.url), answer.request_id
    if isinstance(answer, Exception):
        return type(answer), str(answer)
    for choice in answer.choices:  # the values, and which of them were given
        assert choice.message.model_fields_set >= {"role", "content"}
    fields = [c.model_fields_set | set(c.model_extra or {}) for c in answer.choices]
    answer.id, answer.created = "", 0
    return type(answer), answer, answer.model_dump(), fields, answer._request_id, repr(answer)


async def both(engine: FakeEngine, **call: Any) -> tuple[Any, Any]:
    """What one call gives by each way, on an engine that draws the same for both."""
    outcomes = []
    for kind in (LocalClient, ByHttp):
        engine.requests.clear()
        async with client_of(engine, kind) as client:
            try:
                answer: Any = await client.chat.completions.create(**call)
            except Exception as error:
                answer = error
            outcomes.append((comparable(answer), list(engine.requests)))
    return outcomes[0], outcomes[1]


TEXT = st.text(max_size=8)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "tool"]), "content": TEXT},
    optional={"name": TEXT, "tool_call_id": TEXT},
)
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2**70), st.floats(), TEXT, st.lists(TEXT, max_size=2)
)
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "f", "parameters": {"type": 3}}},
    {"type": "what"},
]
EXTRA = ["ignore_eos", "stop_token_ids", "n", "store", "mad", "messages", "top_k"]
EXTRA += ["return_token_ids", "stream"]
OPTIONS = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, max_size=3)},
    optional={
        "n": st.integers(0, 5),
        "temperature": st.floats(-1, 3) | st.none(),
        "top_p": st.floats(0, 1),
        "max_tokens": st.integers(0, 5000),
        "stop": TEXT | st.lists(TEXT, max_size=2),
        "seed": st.integers(0, 9),
        "logprobs": st.booleans(),
        "user": TEXT,
        "tools": st.lists(st.sampled_from(TOOLS), max_size=2),
        "tool_choice": st.sampled_from(["auto", "none", "required", "what"]),
        "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}, {}]),
        "frequency_penalty": st.floats(-3, 3),
        "logit_bias": st.dictionaries(st.sampled_from(["97", "x"]), st.integers(-101, 101)),
        "top_logprobs": st.integers(0, 3),
        "extra_body": st.dictionaries(
            st.sampled_from(EXTRA),
            ANYTHING,
            max_size=2,
        ),
        "model": st.sampled_from(["m", "x", ""]),
    },
)


@given(OPTIONS)
def test_answers_and_refusals_are_those_of_http(options: dict[str, Any]):
    straight, by_http = asyncio.run(both(FakeEngine(), **{"model": "m", **options}))
    assert straight == by_http


@pytest.mark.parametrize(
    "error",
    [
        BusyError("full"),
        ServeError("broken"),
        RequestError("no", "n"),
        TimeoutError("late"),
        RuntimeError("a bug"),
    ],
    ids=lambda e: type(e).__name__,
)
async def test_errors_of_the_engine_are_those_of_http(error: Exception):
    engine = Failing()
    engine.error = error
    straight, by_http = await both(engine, model="m", messages=HELLO)
    assert straight == by_http
    assert len(straight[1]) == 1  # it wasn't sampled again to learn how it fails


async def test_a_plain_chat_skips_http(monkeypatch: pytest.MonkeyPatch):
    async def fail(*_: Any) -> None:
        raise AssertionError("by HTTP")

    monkeypatch.setattr(module._Transport, "handle_async_request", fail)
    async with client_of(FakeEngine()) as client:
        assert isinstance(client, AsyncOpenAI)
        ask: dict[str, Any] = {"model": "m", "messages": HELLO}
        await client.chat.completions.create(**ask, extra_body={"ignore_eos": True})
        copied = client.with_options(timeout=3).copy(max_retries=2)
        await copied.chat.completions.create(**ask)
        another = openai.DefaultAsyncHttpxClient(transport=client._client._transport)
        for other in (
            client.with_options(base_url="http://elsewhere/v1"),
            client.with_options(default_headers={"a": "b"}).with_options(timeout=3),
            client.with_options(default_query={"a": "b"}),
            client.with_options(http_client=another),
        ):
            assert isinstance(other, LocalClient)
            with pytest.raises(AssertionError, match="by HTTP"):
                await other.chat.completions.create(**ask)
        calls: list[dict[str, Any]] = [
            {"extra_headers": {"a": "b"}},
            {"extra_query": {"a": "b"}},
            {"stream": True},
            {"extra_body": {"stream": True}},
        ]
        for call in calls:
            with pytest.raises(AssertionError, match="by HTTP"):
                await client.chat.completions.create(**ask, **call)


async def test_other_ways_to_ask_still_work():
    class Sorted(BaseModel):
        digits: str

    engine = FakeEngine(lambda prompt, index: '{"digits": "12"}')
    async with client_of(engine) as client:
        raw = await client.chat.completions.with_raw_response.create(model="m", messages=HELLO)
        assert raw.headers["content-type"] == "application/json"
        parsed: Any = raw.parse()
        assert parsed.choices[0].message.content == '{"digits": "12"}'
        async with client.chat.completions.with_streaming_response.create(
            model="m", messages=HELLO
        ) as response:
            assert b"digits" in await response.read()
        assert (await client.models.list()).data[0].id == "m"
    with pytest.raises(ServeError, match="was closed"):
        await client.chat.completions.create(model="m", messages=HELLO)


async def test_an_answer_shares_no_list_with_what_is_recorded():
    episode = Episode()
    async with client_of(FakeEngine()) as client:
        with recording(episode):
            answer: Any = await client.chat.completions.create(model="m", messages=HELLO, n=2)
    first, second = answer.choices
    (kept,) = [item for item in episode.trajectory.messages_and_choices if hasattr(item, "index")]
    for name in ("prompt_token_ids", "token_ids", "token_logprobs"):
        getattr(first, name).append(-1)
        assert -1 not in getattr(second, name) and -1 not in getattr(kept, name)


@pytest.mark.parametrize("kind", [LocalClient, ByHttp])
async def test_a_time_limit_ends_what_is_sampled(kind: type[LocalClient]):
    ended = []

    class Slow(FakeEngine):
        async def complete(self, request: Request) -> list[Completion]:
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(request)
            raise AssertionError

    async with client_of(Slow(), kind) as client:
        begun = time.monotonic()
        for timeout in (0.05, openai.Timeout(None, read=0.05)):
            with pytest.raises(openai.APITimeoutError):
                await client.with_options(timeout=timeout).chat.completions.create(
                    model="m", messages=HELLO
                )
        task = asyncio.ensure_future(client.chat.completions.create(model="m", messages=HELLO))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
    assert len(ended) == 3 and time.monotonic() - begun < 20


@pytest.mark.parametrize("kind", [LocalClient, ByHttp])
async def test_retries_ask_again(kind: type[LocalClient], monkeypatch: pytest.MonkeyPatch):
    engine = Failing()
    engine.error = BusyError("full")

    async def mend(*_: Any, **__: Any) -> None:
        engine.error = None

    monkeypatch.setattr(AsyncOpenAI, "_sleep_for_retry", mend)
    async with client_of(engine, kind) as client:
        answer = await client.with_options(max_retries=1).chat.completions.create(
            model="m", messages=HELLO
        )
    assert len(engine.requests) == 2 and answer.choices


async def test_what_openais_types_lack_is_read_as_by_http(monkeypatch: pytest.MonkeyPatch):
    original = FakeEngine._completion

    def odd(self: FakeEngine, *args: Any) -> Any:
        completion = original(self, *args)
        object.__setattr__(completion, "finish_reason", "tired")
        return completion

    monkeypatch.setattr(FakeEngine, "_completion", odd)
    straight, by_http = await both(FakeEngine(), model="m", messages=HELLO, seed=1)
    assert straight == by_http


async def test_an_answer_is_handed_over_while_it_is_made_and_can_be_left():
    app, sent = fastapi.FastAPI(), []

    @app.get("/v1/numbers")
    async def numbers() -> StreamingResponse:
        async def make() -> AsyncIterator[str]:
            for number in range(1000):
                sent.append(number)
                yield f"{number}\n"

        return StreamingResponse(make())

    async with in_process_client(app) as client:
        async with client._client.stream("GET", "http://gspo.local/v1/numbers") as response:
            lines = response.aiter_lines()
            assert [await anext(lines) for _ in range(3)] == ["0", "1", "2"]
            await asyncio.sleep(0.02)
            assert len(sent) < 3 + 2 * module.STREAM_MESSAGES  # a slow reader holds it up
        await asyncio.sleep(0.02)
        assert asyncio.all_tasks() == {asyncio.current_task()}
    assert len(sent) < 3 + 2 * module.STREAM_MESSAGES
