"""The OpenAI-compatible routes before engines; `gspo.serve.answers` says what choices carry."""

from __future__ import annotations

import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import fastapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from openai.types import Completion as TextAnswer
from openai.types.chat import ChatCompletion
from prometheus_client import CONTENT_TYPE_LATEST

from gspo.core.errors import RequestError
from gspo.serve import episodes
from gspo.serve.answers import Asked, TextCompletion
from gspo.serve.constraint import answer_grammar
from gspo.serve.conversation import Conversation
from gspo.serve.engine import Completion, Engine, Piece, Request
from gspo.serve.episode_routes import include_episodes
from gspo.serve.messages import text_messages, texts_in
from gspo.serve.meters import Metered, Meters
from gspo.serve.params import MOST_COMPLETIONS
from gspo.serve.refusals import DOCUMENTED, Refusal, add_handlers
from gspo.serve.responses import GrowingResponse
from gspo.serve.responses_input import ResponsesBody, chat_of
from gspo.serve.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from gspo.serve.streaming import EventStream, begun, pieces
from gspo.serve.verbatim import chat_tokens, rollout_memory
from gspo.serve.waiting import LONG_TEXT, aside, together, tokenized, unless_gone

Find = Callable[[str], Awaitable[Engine]]

# The handlers are functions of the module, not closures: FastAPI never lets go of a handler.
router, v1 = fastapi.APIRouter(), fastapi.APIRouter()


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
    include_episodes(app, v1)
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
        await _engine(http.app, model)  # which says what there is
    return _model_entry(http, model)


@v1.post("/chat/completions", responses=_answers(ChatCompletion))
async def chat(http: fastapi.Request, body: ChatBody) -> Response:
    return await _reply(http, _conversation(http.app, body, http))


async def chat_answer(app: fastapi.FastAPI, body: ChatBody) -> dict[str, Any]:
    """Answer a chat of this process that is no stream and comes through no app."""
    call = await _conversation(app, body, None)
    return call.answer(await _sample(app, call))


async def _reply(http: fastapi.Request, asked: Coroutine[Any, Any, Asked]) -> Response:
    """Answer in the shape that is asked for, whole or as a stream of chunks."""
    call = await unless_gone(http, asked)
    if call.body.stream:
        events = call.chunks(_pieces(http, call), call.body.usage_asked())
        return EventStream(await unless_gone(http, begun(events)))
    # Sent as it is: validating our own answer again would cost more than sampling it.
    return JSONResponse(call.answer(await unless_gone(http, _sample(http.app, call))))


async def _conversation(
    app: fastapi.FastAPI, body: ChatBody, http: fastapi.Request | None
) -> Conversation:
    """Prepare a chat."""
    engine, params, episode = await _engine(app, body.model), body.params(), episodes.current(app)
    memory = episode.memory if episode else rollout_memory()
    messages, tools = text_messages(body.messages), body.tools or None
    continues = bool(body.continue_final_message)
    reads = engine.chat.wants_special(body.calls())
    if reads and body.skip_special_tokens is False:
        raise RequestError(
            "skip_special_tokens = false: calls of tools are read from the special tokens, which "
            "are no part of the message",
            "skip_special_tokens",
        )
    grammar = answer_grammar(engine.chat, body)
    options = {
        "tools": tools,
        "template_kwargs": body.template_kwargs(engine.chat),
        "continue_final": continues,
        "memory": memory,
    }
    texts = texts_in([messages, tools, options["template_kwargs"]])
    prompt = await tokenized(http, engine, texts, lambda: chat_tokens(engine, messages, **options))
    call = Conversation(
        engine=engine,
        body=body,
        messages=body.messages[: len(messages) - continues],
        begun=messages[-1]["content"] if continues else "",
        prompts=[tuple(prompt)],
        params=replace(
            params, grammar=grammar, skip_special_tokens=params.skip_special_tokens and not reads
        ),
        episode=episode,
        memory=memory,
    )
    if grammar:  # compiling it takes a while
        await aside(http, lambda: engine.check(call.requests[0]), True)
    return call


@v1.post("/responses", responses=_answers(None))
async def responses(http: fastapi.Request, body: ResponsesBody) -> Response:
    call = await unless_gone(http, _conversation(http.app, chat_of(body), http))
    answer = GrowingResponse(body, call)
    if body.stream:
        events = answer.events(_pieces(http, call))
        return EventStream(await unless_gone(http, begun(events)), named=True)
    ((completion,),) = await unless_gone(http, _sample(http.app, call))
    return JSONResponse(answer.answer(completion))


@v1.post("/completions", responses=_answers(TextAnswer))
async def completions(http: fastapi.Request, body: CompletionBody) -> Response:
    return await _reply(http, _text_completion(http, body))


async def _text_completion(http: fastapi.Request, body: CompletionBody) -> TextCompletion:
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
            tuple(engine.tokenizer.encode(p, special=special) if isinstance(p, str) else p)
            for p in given
        ]

    prompts = await tokenized(http, engine, [p for p in given if isinstance(p, str)], encode)
    return TextCompletion(
        engine=engine,
        body=body,
        prompts=prompts,
        params=params,
        episode=episodes.current(http.app),
    )


@router.post("/tokenize")
async def tokenize(http: fastapi.Request, body: TokenizeBody) -> dict[str, Any]:
    engine = await _engine(http.app, body.model)
    text, messages = body.content()
    if messages is not None:
        options = {"tools": body.tools, "template_kwargs": body.chat_template_kwargs}
        texts = texts_in([messages, *options.values()])
        encode = partial(chat_tokens, engine, messages, **options)
    else:
        special = body.add_special_tokens is not False
        texts, encode = [text], partial(engine.tokenizer.encode, text, special=special)
    ids = await tokenized(http, engine, texts, encode)
    return {"tokens": ids, "count": len(ids)}


@router.post("/detokenize")
async def detokenize(http: fastapi.Request, body: DetokenizeBody) -> dict[str, Any]:
    engine = await _engine(http.app, body.model)
    body.refuse_unknown()
    ids = body.tokens
    if ids:  # `check` refuses what are no tokens of the model
        engine.check(Request((min(ids), max(ids))))
    if len(ids) > (most := engine.tokenizer.most_characters):
        raise RequestError(f"{len(ids)} tokens: at most {most} are read at once", "tokens")
    text = await aside(
        http, partial(engine.tokenizer.decode, ids, special=True), len(ids) >= LONG_TEXT
    )
    return {"prompt": text}


async def _engine(app: fastapi.FastAPI, name: str) -> Engine:
    """The engine of this model.

    Raises:
        Refusal: the server has no such model.
        ServeError: it is closed.
    """
    try:
        engine = await app.state.find(name)
    except RequestError as error:
        raise Refusal(404, str(error), "model_not_found", "model") from None
    app.state.engines[name] = engine
    return engine


def _model_entry(http: fastapi.Request, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": http.app.state.began, "owned_by": "gspo"}


async def _sample(app: fastapi.FastAPI, call: Asked) -> list[list[Completion]]:
    """Sample what is asked. To cancel it, cancel the task that awaits it."""
    done = await together(call.engine, call.requests)
    _count(app, call, sum(len(c.token_ids) for answer in done for c in answer))
    return done


async def _pieces(http: fastapi.Request, call: Asked) -> AsyncGenerator[tuple[int, Piece], None]:
    """Sample what is asked, piece by piece."""
    began, sampled = time.monotonic(), 0
    for request in call.requests:
        call.engine.check(request)
    try:
        async with aclosing(pieces(call.engine, call.requests)) as source:
            async for number, piece in source:
                if not sampled:
                    http.app.state.meters.first_token.observe(time.monotonic() - began)
                sampled += len(piece.token_ids)
                yield number, piece
    finally:
        _count(http.app, call, sampled)


def _count(app: fastapi.FastAPI, call: Asked, sampled: int) -> None:
    tokens = app.state.meters.tokens
    tokens.labels("prompt").inc(sum(map(len, call.prompts)))
    tokens.labels("sampled").inc(sampled)
