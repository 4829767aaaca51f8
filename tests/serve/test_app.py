"""The OpenAI-compatible routes, before the fake engine."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import uvicorn
from openai import APIStatusError, AsyncOpenAI, BadRequestError, NotFoundError, RateLimitError

from gspo.core.errors import BusyError
from gspo.data.turn import read_turn
from gspo.serve.engine import Completion, Piece, Request
from gspo.serve.fake_engine import FakeEngine
from gspo.serve.local_client import in_process_client
from gspo.serve.server import bind
from gspo.serve.verbatim import chat_tokens
from support import app_of

HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def client(engine: FakeEngine):
    client = in_process_client(app_of(engine))
    yield client
    await client.close()


async def test_chat_choices_carry_what_training_needs(client: AsyncOpenAI, engine: FakeEngine):
    response = await client.chat.completions.create(model="m", messages=HELLO, n=3, seed=1)
    assert [c.index for c in response.choices] == [0, 1, 2]
    for choice in response.choices:
        extra: Any = choice
        assert extra.prompt_token_ids == chat_tokens(engine, HELLO)
        assert engine.tokenizer.decode(extra.token_ids) == choice.message.content
        assert len(extra.token_logprobs) == len(extra.token_ids)
        assert (extra.temperature, extra.policy_version) == (1.0, 0)
        assert choice.logprobs is None
    assert response.usage is not None
    assert response.usage.prompt_tokens == len(chat_tokens(engine, HELLO))


async def test_logprobs_in_openais_form_where_asked(client: AsyncOpenAI):
    response = await client.chat.completions.create(model="m", messages=HELLO, logprobs=True)
    choice: Any = response.choices[0]
    assert [e.logprob for e in choice.logprobs.content] == choice.token_logprobs
    assert "".join(e.token for e in choice.logprobs.content).rstrip("\0") == choice.message.content


async def test_completions_take_text_and_token_ids(client: AsyncOpenAI, engine: FakeEngine):
    response = await client.completions.create(model="m", prompt=["ab", "cd"], n=2, logprobs=0)
    prompts = [c.prompt_token_ids for c in response.choices]  # pyright: ignore[reportAttributeAccessIssue]
    assert prompts == [[97, 98], [97, 98], [99, 100], [99, 100]]
    logprobs = response.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None
    ids = await client.completions.create(model="m", prompt=[97, 98], seed=0)
    text = await client.completions.create(model="m", prompt="ab", seed=0)
    assert ids.choices[0].text == text.choices[0].text


async def test_text_parts_are_joined(client: AsyncOpenAI, engine: FakeEngine):
    parts: Any = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    message: Any = [{"role": "user", "content": parts}]
    response: Any = await client.chat.completions.create(model="m", messages=message)
    assert response.choices[0].prompt_token_ids == chat_tokens(engine, HELLO)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"tools": [{"type": "function"}]}, r"tools\[0\] = "),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs = 21"),
        ({"top_logprobs": 2}, "top_logprobs is for logprobs = true"),
        ({"logit_bias": {"x": 1}}, "logit_bias: 'x'"),
        ({"tool_choice": "required"}, "the request's tools are"),
        ({"response_format": {"type": "xml"}}, "response_format = "),
        ({"reasoning_effort": "low"}, "the chat template of FakeEngine knows none"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"store": True}, "store is not supported"),
        ({"n": 0}, "n = 0"),
        ({"top_p": 2}, "top_p = 2"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"extra_body": {"max_token": 3}}, "Did you mean 'max_tokens'"),
        ({"extra_body": {"n": "many"}}, "n: Input should be a valid integer"),
        ({"max_tokens": 5000}, "context is 4096"),
    ],
)
async def test_what_means_nothing_is_refused_by_name(client, extra: dict, message: str):
    with pytest.raises(BadRequestError, match=message):
        await client.chat.completions.create(model="m", messages=HELLO, **extra)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty = 0.0 (float): must be in [0.01, 100]"),
        ({"echo": True}, "echo is not supported: log-probs are of sampled tokens only"),
        (
            {"add_special_tokens": True},
            "add_special_tokens is not supported: the chat template writes them",
        ),
        ({"top_k": -5}, "top_k = -5 (int): must be at least 1, or 0 for all tokens"),
        ({"max_tokenz": 5}, "'max_tokenz'. Did you mean 'max_tokens'?"),
        ({"stop_tokens_please": [1]}, "unknown parameter 'stop_tokens_please'."),
        ({"guided_json": "x"}, "unknown parameter 'guided_json'."),
        ({"min_tokens": 3}, "FakeEngine replies with the text that it was given"),
        ({"temperature": 1e-40}, "temperature = 1e-40 (float): must be 0, or in [0.001, 100]"),
    ],
)
async def test_hints_are_given_only_where_a_name_is_near(client, extra: dict, message: str):
    with pytest.raises(BadRequestError) as refused:
        await client.chat.completions.create(model="m", messages=HELLO, extra_body=extra)
    body: Any = refused.value.body  # how str() shows it depends on openai's release
    assert body["message"].endswith(message)


async def test_stop_token_ids_and_special_tokens_reach_the_engine(client, engine: FakeEngine):
    await client.completions.create(
        model="m",
        prompt="x",
        extra_body={
            "stop_token_ids": [98],
            "skip_special_tokens": False,
            "add_special_tokens": False,
        },
    )
    params = engine.requests[-1].params
    assert (params.stop_token_ids, params.skip_special_tokens) == ((98,), False)


async def test_bytes_of_the_chosen_tokens(client: AsyncOpenAI):
    answer = await client.chat.completions.create(model="m", messages=HELLO, logprobs=True)
    choice = answer.choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    joined = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    assert joined.decode().rstrip("\0") == choice.message.content


async def test_neutral_values_are_taken(client: AsyncOpenAI):
    await client.chat.completions.create(
        model="m", messages=HELLO, stream=False, presence_penalty=0, user="me", logit_bias={}
    )


async def test_unknown_models_and_bad_messages(client: AsyncOpenAI):
    with pytest.raises(NotFoundError, match="no model 'x' here") as refused:
        await client.chat.completions.create(model="x", messages=HELLO)
    assert refused.value.code == "model_not_found"
    with pytest.raises(BadRequestError, match=r"messages\[0\] has no role"):
        await client.chat.completions.create(model="m", messages=[{"content": "x"}])  # pyright: ignore[reportArgumentType]
    image: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(BadRequestError, match="only text parts"):
        await client.chat.completions.create(model="m", messages=image)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([10**7], r"token id 10000000 \(int\), but the model's vocabulary is 0\.\.1114111"),
        ([97, -1], r"token id -1 \(int\)"),
        ([10**30], "token id 10+ "),
        ([[97], [10**7]], "token id 10000000 "),
        ([], "at least one prompt"),
        ([[]], "the prompt is empty"),
        (["1", 2], "prompt.*valid string"),
        ([True], "prompt"),
    ],
)
async def test_a_bad_prompt_is_refused_and_its_neighbours_are_answered(
    client, engine: FakeEngine, prompt: Any, message: str
):
    async def ask(value: Any) -> Any:
        return await client.completions.create(model="m", prompt=value)

    answers: Any = await asyncio.gather(ask(prompt), ask([97, 98]), return_exceptions=True)
    bad, good = answers
    assert isinstance(bad, BadRequestError) and re.search(message, str(bad))
    assert len(good.choices) == 1
    assert [request.prompt for request in engine.requests] == [(97, 98)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["hi"], "only text parts are supported.*hi"),
        ([None], "only text parts are supported.*None"),
        ([[]], "only text parts"),
        ([{"type": "text", "text": 5}], "only text parts.*'text': 5"),
        ([{"type": "text"}], "only text parts.*not {'type': 'text'}"),
        (5, r"messages\[0\].content = 5"),
        ({"type": "text", "text": "hi"}, r"messages\[0\].content = "),
    ],
)
async def test_content_that_is_no_text_is_refused(client, content: Any, message: str):
    with pytest.raises(BadRequestError, match=message):
        await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": content}]
        )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"n": True}, "n: Input should be a valid integer"),
        ({"n": "2"}, "n: Input should be a valid integer"),
        ({"stream": 0}, "stream: Input should be a valid boolean"),
        ({"presence_penalty": False}, "presence_penalty: Input should be"),
        ({"logprobs": -1}, "logprobs = -1"),
        ({"logprobs": 21}, "logprobs = 21"),
        ({"temperature": "1"}, "temperature: "),
    ],
)
async def test_values_of_another_type_are_refused(client, extra: dict, message: str):
    with pytest.raises(BadRequestError, match=message):
        await client.completions.create(model="m", prompt="x", extra_body=extra)


async def test_models_and_health(client: AsyncOpenAI):
    assert [m.id for m in (await client.models.list()).data] == ["m"]
    with pytest.raises(APIStatusError):
        await client.models.retrieve("x")


class Busy(FakeEngine):
    async def complete(self, request: Request) -> list[Completion]:
        raise BusyError("9 requests are not answered yet")


async def test_too_many_requests_are_told_to_come_again():
    async with in_process_client(app_of(Busy())) as client:
        with pytest.raises(RateLimitError, match="9 requests") as refused:
            await client.completions.create(model="m", prompt="x")
    assert refused.value.response.headers["retry-after"] == "1"


class Changing(FakeEngine):
    """New weights reach it after each first token."""

    async def complete(self, request: Request) -> list[Completion]:
        return [
            replace(done, policy_versions=(0, *[1] * (len(done.token_ids) - 1)))
            for done in await super().complete(request)
        ]


async def test_each_tokens_version_is_told_if_they_differ():
    async with in_process_client(app_of(Changing())) as client:
        answer = await client.completions.create(model="m", prompt="x", seed=0)
    turn = read_turn(answer.choices[0], "c")
    assert turn.policy_version == 0
    assert turn.policy_versions == (0, *[1] * (len(turn.tokens) - 1))


class Endless(FakeEngine):
    """Never answers; remembers who gave up."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.gone = asyncio.Event(), asyncio.Event()

    async def complete(self, request: Request) -> list[Completion]:
        self.began.set()
        try:
            return await asyncio.get_running_loop().create_future()
        finally:
            self.gone.set()


@pytest.mark.parametrize("prompts", [["a"], ["a", "b"]])
async def test_a_client_that_gives_up_is_let_go_of(prompts: list[str]):
    engine = Endless()
    async with in_process_client(app_of(engine)) as client:
        asking = asyncio.create_task(client.completions.create(model="m", prompt=prompts))
        await asyncio.wait_for(engine.began.wait(), 20)
        asking.cancel()
        await asyncio.wait_for(engine.gone.wait(), 20)


@asynccontextmanager
async def listening(engine: FakeEngine):
    """The address of a real socket."""
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app_of(engine), log_level="error", lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    yield listener.getsockname()
    server.should_exit = True
    await asyncio.wait_for(serving, 20)


async def test_openais_client_through_a_socket():
    engine = FakeEngine(lambda prompt, index: "h\u00e9\u6f22")
    async with listening(engine) as (host, port):
        base_url = f"http://{host}:{port}/v1"
        async with AsyncOpenAI(base_url=base_url, api_key="x", max_retries=0) as client:
            assert (await client.models.retrieve("m")).owned_by == "gspo"
            with pytest.raises(NotFoundError) as unknown:
                await client.models.retrieve("x")
            assert unknown.value.code == "model_not_found"
            plain = await client.chat.completions.create(model="m", messages=HELLO)
            stream = await client.chat.completions.create(model="m", messages=HELLO, stream=True)
            parts = [c.choices[0].delta.content or "" async for c in stream]
            assert "".join(parts) == plain.choices[0].message.content == "h\u00e9\u6f22"
            events = await client.responses.create(model="m", input="x", stream=True)
            assert [e.type async for e in events][-1] == "response.completed"


class Dripping(Endless):
    """Streams one token, then nothing; remembers who gave up."""

    async def stream(self, request: Request) -> AsyncGenerator[Piece, None]:
        yield Piece(0, (97,), (-1.0,))
        await self.complete(request)


@pytest.mark.parametrize(
    ("engine", "body"),
    [
        (Endless(), b'{"model": "m", "prompt": "x"}'),
        (Dripping(), b'{"model": "m", "prompt": "x", "stream": true}'),
        (Dripping(), b'{"model": "m", "prompt": ["x", "y"], "stream": true}'),
    ],
)
async def test_a_client_that_hangs_up_is_let_go_of(engine: Endless, body: bytes):
    async with listening(engine) as address:
        _, writer = await asyncio.open_connection(*address)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        await asyncio.wait_for(engine.began.wait(), 20)
        writer.close()
        await asyncio.wait_for(engine.gone.wait(), 20)


async def test_texts_and_tokens_there_and_back(client: AsyncOpenAI, engine: FakeEngine):
    async def post(path: str, **body: Any) -> Any:
        url = f"http://gspo.local/{path}"
        return await client.post(url, body={"model": "m", **body}, cast_to=object)

    assert await post("tokenize", prompt="ab") == {"tokens": [97, 98], "count": 2}
    assert (await post("tokenize", messages=HELLO))["tokens"] == chat_tokens(engine, HELLO)
    assert await post("detokenize", tokens=[97, 98]) == {"prompt": "ab"}
    with pytest.raises(BadRequestError, match="token id 10000000"):
        await post("detokenize", tokens=[1, 10**7])
    with pytest.raises(BadRequestError, match="give either prompt"):
        await post("tokenize")
