"""The OpenAI-compatible routes before engines; `gspo.serve.answers` says what choices carry."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

import fastapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from openai.types import Completion as TextAnswer
from openai.types.chat import ChatCompletion
from prometheus_client import CONTENT_TYPE_LATEST

from gspo.core.errors import RequestError
from gspo.serve import episodes
from gspo.serve.constraint import answer_grammar
from gspo.serve.conversation import Conversation, chat_chunks
from gspo.serve.engine import Completion, Engine, Piece, Request
from gspo.serve.meters import Metered, Meters
from gspo.serve.refusals import DOCUMENTED, HungUpError, UnknownModelError, add_handlers
from gspo.serve.responses import GrowingResponse, chat_of
from gspo.serve.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ResponsesBody,
    TokenizeBody,
    texts_in,
)
from gspo.serve.streaming import EventStream, begun, pieces
from gspo.serve.text_completion import TextCompletion

T = TypeVar("T")
Find = Callable[[str], Awaitable[Engine]]

# The handlers are functions of the module, not closures: FastAPI never lets go of a handler.
router, v1 = fastapi.APIRouter(), fastapi.APIRouter()
IN_PROCESS = "in-process"
"""The client's host in requests that come through no socket."""
MOST_COMPLETIONS = 4096
"""Of one request, over all its prompts."""
LONG_TEXT = 10_000
"""Characters. Longer texts are tokenized in a thread, so that others don't wait."""


def _answers(model: Any) -> dict[int | str, dict[str, Any]]:
    """What a route's document says of its answers: of openai's type, or a stream."""
    stream = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
    return {200: stream if model is None else {**stream, "model": model}}


def create_app(find: Find, names: Callable[[], list[str]]) -> fastapi.FastAPI:
    """Make the app that answers for engines.

    Args:
        find: gives the engine of a model's name. It raises RequestError for an unknown one, and
            ServeError once it is closed.
        names: the model names that requests may give.
    """
    app = fastapi.FastAPI(title="gspo", docs_url=None, redoc_url=None, responses=DOCUMENTED)
    app.state.find, app.state.names = find, names
    # Those that were asked for, by name: /metrics shows them. Whoever finds them frees them.
    app.state.engines = weakref.WeakValueDictionary()
    app.state.meters = Meters()
    app.state.began = int(time.time())
    app.include_router(router)
    app.include_router(v1, prefix="/v1")
    episodes.include_episodes(app, v1)
    app.add_middleware(Metered, meters=app.state.meters)
    add_handlers(app)
    return app


def one_engine(engine: Engine, names: Callable[[], list[str]]) -> Find:
    """Make the `find` of a server that has one engine, under each of its names."""

    async def find(name: str) -> Engine:
        if name not in names():
            raise RequestError(f"no model {name!r} here; this server has {names()}", "model")
        return engine

    return find


@router.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(http: fastapi.Request) -> Response:
    state = http.app.state
    for name in state.names()[:1]:  # nobody may have asked for it yet
        await _engine(http.app, name)
    engines = {name: e for name, e in state.engines.items() if name in state.names()}
    return Response(state.meters.text(engines), media_type=CONTENT_TYPE_LATEST)


@v1.get("/models")
async def models(http: fastapi.Request) -> dict[str, Any]:
    data = [_model_entry(http, name) for name in http.app.state.names()]
    return {"object": "list", "data": data}


@v1.get("/models/{model:path}")
async def model(http: fastapi.Request, model: str) -> dict[str, Any]:
    if model not in http.app.state.names():
        raise UnknownModelError(_no_model(http, model), "model")
    return _model_entry(http, model)


@v1.post("/chat/completions", responses=_answers(ChatCompletion))
async def chat(http: fastapi.Request, body: ChatBody) -> Response:
    if not body.stream:
        # Sent as it is: validating our own answer again would cost more than sampling it.
        return JSONResponse(await _unless_gone(http, chat_answer(http.app, body, http)))
    call = await _conversation(http.app, body, http)
    events = chat_chunks(call, _pieces(http, call.engine, [call.request]), body.usage_asked())
    return EventStream(await _unless_gone(http, begun(events)))


async def chat_answer(
    app: fastapi.FastAPI, body: ChatBody, http: fastapi.Request | None = None
) -> dict[str, Any]:
    """Answer a chat that is no stream. To cancel it, cancel the task that awaits it.

    Args:
        app: see `create_app`.
        body: what is asked.
        http: that it came in; None: in this process, through no app.
    """
    call = await _conversation(app, body, http)
    completions = await call.engine.complete(call.request)
    _count(app, [call.request], sum(len(c.token_ids) for c in completions))
    return call.answer(completions)


async def _conversation(
    app: fastapi.FastAPI, body: ChatBody, http: fastapi.Request | None
) -> Conversation:
    """Prepare a chat."""
    engine, params, episode = await _engine(app, body.model), body.params(), episodes.current(app)
    messages, tools = body.text_messages(), body.tools or None
    must_call, schema = body.must_call(), body.answer_schema()
    calls = tools if body.tool_choice != "none" else None
    reads = engine.chat.wants_special(calls)
    if reads and body.skip_special_tokens is False:
        raise RequestError(
            "skip_special_tokens = false: calls of tools are read from the special tokens, which "
            "are no part of the message",
            "skip_special_tokens",
        )
    grammar = answer_grammar(
        engine.chat,
        calls,
        must_call=must_call,
        parallel=body.parallel_tool_calls is not False,
        schema=schema,
    )
    options = {
        "tools": tools,
        "template_kwargs": body.template_kwargs(engine.chat),
        "continue_final": bool(body.continue_final_message),
        "memory": None if episode is None else episode.memory,
    }
    texts = texts_in([messages, tools, options["template_kwargs"]])
    prompt = await _tokenized(http, engine, texts, lambda: engine.encode_chat(messages, **options))
    return Conversation(
        engine=engine,
        model=body.model,
        messages=body.messages,
        prompt=tuple(prompt),
        params=replace(
            params,
            grammar=grammar,
            skip_special_tokens=params.skip_special_tokens and not reads,
        ),
        tools=tools,
        reads=reads,
        calls=calls is not None,
        logprobs=bool(body.logprobs),
        tokens=body.tokens_asked(),
        episode=episode,
    )


@v1.post("/responses", responses=_answers(None))
async def responses(http: fastapi.Request, body: ResponsesBody) -> Response:
    call = await _unless_gone(http, _conversation(http.app, chat_of(body), http))
    answer = GrowingResponse(body, call)
    if body.stream:
        events = answer.events(_pieces(http, call.engine, [call.request]))
        return EventStream(await _unless_gone(http, begun(events)), named=True)
    (completion,) = await _unless_gone(http, call.engine.complete(call.request))
    _count(http.app, [call.request], len(completion.token_ids))
    return JSONResponse(answer.answer(completion))


@v1.post("/completions", responses=_answers(TextAnswer))
async def completions(http: fastapi.Request, body: CompletionBody) -> Response:
    engine, params = await _engine(http.app, body.model), body.params()
    given = body.prompts()
    if len(given) * params.n > MOST_COMPLETIONS:
        raise RequestError(
            f"{len(given)} prompts x n = {params.n} are more than {MOST_COMPLETIONS} completions",
            "n",
        )

    def encode() -> list[tuple[int, ...]]:
        special = body.add_special_tokens is not False
        return [
            tuple(engine.encode(p, special=special) if isinstance(p, str) else p) for p in given
        ]

    prompts = await _tokenized(http, engine, [p for p in given if isinstance(p, str)], encode)
    call = TextCompletion(
        engine=engine,
        model=body.model,
        prompts=prompts,
        params=params,
        logprobs=body.logprobs is not None,
        tokens=body.tokens_asked(),
        episode=episodes.current(http.app),
    )
    if body.stream:
        events = call.chunks(_pieces(http, engine, call.requests), body.usage_asked())
        return EventStream(await _unless_gone(http, begun(events)))
    for request in call.requests:  # all of them, before the first is sampled
        engine.check(request)
    done = await _unless_gone(http, _together(engine, call.requests))
    _count(http.app, call.requests, sum(len(c.token_ids) for answer in done for c in answer))
    return JSONResponse(call.answer(done))


@router.post("/tokenize")
async def tokenize(http: fastapi.Request, body: TokenizeBody) -> dict[str, Any]:
    engine = await _engine(http.app, body.model)
    text, messages = body.content()
    if messages is not None:
        options = {"tools": body.tools, "template_kwargs": body.chat_template_kwargs}
        texts = texts_in([messages, *options.values()])
        ids = await _tokenized(http, engine, texts, lambda: engine.encode_chat(messages, **options))
    else:
        special = body.add_special_tokens is not False
        ids = await _tokenized(http, engine, [text], lambda: engine.encode(text, special=special))
    return {"tokens": ids, "count": len(ids)}


@router.post("/detokenize")
async def detokenize(http: fastapi.Request, body: DetokenizeBody) -> dict[str, Any]:
    engine = await _engine(http.app, body.model)
    body.refuse_unknown()
    if body.tokens:  # `check` refuses what are no tokens of the model
        engine.check(Request((min(body.tokens), max(body.tokens))))
    return {"prompt": engine.decode(body.tokens, special=True)}


async def _engine(app: fastapi.FastAPI, name: str) -> Engine:
    """The engine of this model.

    Raises:
        UnknownModelError: the server has no such model.
        ServeError: it is closed.
    """
    try:
        engine = await app.state.find(name)
    except RequestError as error:
        raise UnknownModelError(str(error), "model") from None
    app.state.engines[name] = engine
    return engine


def _model_entry(http: fastapi.Request, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": http.app.state.began, "owned_by": "gspo"}


def _no_model(http: fastapi.Request, name: str) -> str:
    return f"no model {name!r} here; this server has {http.app.state.names()}"


def _in_process(http: fastapi.Request | None) -> bool:
    if http is None:
        return True
    return http.client is not None and http.client.host == IN_PROCESS


async def _tokenized(
    http: fastapi.Request | None, engine: Engine, texts: Sequence[str], encode: Callable[[], T]
) -> T:
    """Tokenize `texts` by `encode`, unless they cannot fit into the context anyway.

    Raises:
        RequestError: they are too long, or no text.
    """
    for text in texts:
        if len(text) > engine.most_characters:
            raise RequestError(
                f"a text of {len(text)} characters cannot fit: the model's context holds "
                f"{engine.most_characters} at most",
                "prompt",
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"a text has half a surrogate pair in it: {error}") from None
    # In process nobody else waits in this loop; and threads would join requests to batches in
    # another order each time.
    if _in_process(http) or sum(map(len, texts)) < LONG_TEXT:
        return encode()
    return await asyncio.to_thread(encode)


async def _together(engine: Engine, requests: Sequence[Request]) -> list[list[Completion]]:
    """Sample several requests; if one fails, the others are let go of."""
    if len(requests) == 1:
        return [await engine.complete(requests[0])]
    tasks = [asyncio.create_task(engine.complete(request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _pieces(
    http: fastapi.Request, engine: Engine, requests: Sequence[Request]
) -> AsyncGenerator[tuple[int, Piece], None]:
    """Sample what is asked, piece by piece."""
    began, sampled = time.monotonic(), 0
    for request in requests:
        engine.check(request)
    try:
        async with aclosing(pieces(engine, requests)) as source:
            async for number, piece in source:
                if not sampled:
                    http.app.state.meters.first_token.observe(time.monotonic() - began)
                sampled += len(piece.token_ids)
                yield number, piece
    finally:
        _count(http.app, requests, sampled)


def _count(app: fastapi.FastAPI, requests: Sequence[Request], sampled: int) -> None:
    tokens = app.state.meters.tokens
    tokens.labels("prompt").inc(sum(len(request.prompt) for request in requests))
    tokens.labels("sampled").inc(sampled)


async def _unless_gone(http: fastapi.Request, coroutine: Coroutine[Any, Any, T]) -> T:
    """Await what is to be answered, unless the client hangs up.

    Raises:
        HungUpError: it did.
    """
    if _in_process(http):  # its client cancels this task itself
        return await coroutine
    work = asyncio.ensure_future(coroutine)
    # The body is read: the next message is that the client is gone.
    gone = asyncio.ensure_future(http.receive())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise HungUpError("the client hung up")
        return work.result()
    finally:
        gone.cancel()
        work.cancel()
