"""The OpenAI-compatible routes before an engine.

Beside OpenAI's fields, each choice carries what training needs: `token_ids`,
`prompt_token_ids`, `token_logprobs`, `temperature` and `policy_version`; with
`return_routes: true`, an MoE engine's `routed_experts` too; and `policy_versions`, one of each
token, if weights were published while it was sampled.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from gspo.core.errors import BusyError, GspoError, RequestError, ServeError
from gspo.data.expert_choices import encode_expert_choices
from gspo.serve import episodes
from gspo.serve.engine import Completion, Engine, Request
from gspo.serve.schemas import ChatBody, CompletionBody

# The handlers are functions of the module, not closures: FastAPI never lets go of a handler.
router, v1 = fastapi.APIRouter(), fastapi.APIRouter()
IN_PROCESS = "in-process"
"""The client's host in requests that come through no socket."""
RETRY_SECONDS = 1
_numbers = itertools.count(1)  # numbers the answers of this process


def create_app(engine: Engine, names: Callable[[], list[str]]) -> fastapi.FastAPI:
    """Make the app that answers for an engine.

    Args:
        engine: where requests go.
        names: the model names that requests may give.
    """
    app = fastapi.FastAPI(title="gspo", docs_url=None, redoc_url=None)
    app.state.engine, app.state.names = engine, names
    app.include_router(router)
    app.include_router(v1, prefix="/v1")
    episodes.include_episodes(app, v1)
    for kind in (GspoError, RequestValidationError):
        app.add_exception_handler(kind, _refusal)
    return app


@router.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@v1.get("/models")
async def models(http: fastapi.Request) -> dict[str, Any]:
    names = http.app.state.names()
    entries = [{"id": n, "object": "model", "created": 0, "owned_by": "gspo"} for n in names]
    return {"object": "list", "data": entries}


@v1.post("/chat/completions")
async def chat(http: fastapi.Request, body: ChatBody) -> JSONResponse:
    engine, params = _engine(http, body.model), body.sampling(body.limit())
    prompt = engine.encode_chat(body.text_messages())
    choices = []
    (answer,) = await _sampled(http, engine, [Request(tuple(prompt), params)])
    for completion in answer:
        message = {"role": "assistant", "content": completion.text}
        logprobs = {"content": _token_entries(engine, completion)} if body.logprobs else None
        choices.append(
            {"message": message, "logprobs": logprobs, **_training_fields(prompt, completion)}
        )
    if (episode := episodes.current(http)) is not None:
        for choice in choices:
            episode.record(body.messages, None, choice)
    return _answer("chatcmpl", "chat.completion", body.model, choices, [prompt])


@v1.post("/completions")
async def completions(http: fastapi.Request, body: CompletionBody) -> JSONResponse:
    engine, params = _engine(http, body.model), body.sampling(body.max_tokens)
    if body.logprobs not in (None, 0):
        raise RequestError("logprobs: only 0, the chosen tokens', is supported", "logprobs")
    special = body.add_special_tokens
    prompts = [
        engine.encode(p, special=special) if isinstance(p, str) else p for p in body.prompts()
    ]
    answers = await _sampled(http, engine, [Request(tuple(prompt), params) for prompt in prompts])
    choices = []
    for prompt, answer in zip(prompts, answers, strict=True):
        for completion in answer:
            logprobs = None if body.logprobs is None else _token_lists(engine, completion)
            fields = {"text": completion.text, "logprobs": logprobs}
            choices.append(fields | _training_fields(prompt, completion))
            if (episode := episodes.current(http)) is not None:
                episode.record_text(engine.decode(prompt, special=True), choices[-1])
    return _answer("cmpl", "text_completion", body.model, choices, prompts)


def _engine(http: fastapi.Request, model: str) -> Engine:
    """The engine of this model.

    Raises:
        RequestError: the server has no such model.
        ServeError: it is closed.
    """
    names = http.app.state.names()
    if model not in names:
        raise RequestError(f"no model {model!r} here; this server has {names}", "model")
    if http.app.state.engine is None:
        raise ServeError("the backend that served this model is closed")
    return http.app.state.engine


async def _sampled(
    http: fastapi.Request, engine: Engine, requests: Sequence[Request]
) -> list[list[Completion]]:
    """Sample what is asked, unless the client hangs up."""
    in_process = http.client is not None and http.client.host == IN_PROCESS
    if in_process and len(requests) == 1:  # its client cancels this task itself
        return [await engine.complete(requests[0])]
    for request in requests:  # all of them, before the first is sampled
        engine.check(request)
    work = asyncio.gather(*(engine.complete(request) for request in requests))
    if in_process:
        return await work
    # The body is read: the next message is that the client is gone.
    gone = asyncio.ensure_future(http.receive())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ServeError("the client hung up")
        return work.result()
    finally:
        work.cancel()
        gone.cancel()


async def _refusal(http: fastapi.Request, error: Exception) -> JSONResponse:
    """An error in OpenAI's form: with status 400 if the request is to blame, 429 if it should be
    sent again later, else 500."""
    message, param, status = str(error), None, 500
    if isinstance(error, RequestError):
        param, status = error.param, 400
    elif isinstance(error, BusyError):
        status = 429
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        param, status = ".".join(str(name) for name in first["loc"] if name != "body"), 400
        message = f"{param}: {first['msg']}"
    kinds = {400: "invalid_request_error", 429: "rate_limit_error", 500: "server_error"}
    detail = {"message": message, "type": kinds[status], "param": param, "code": None}
    headers = {"Retry-After": str(RETRY_SECONDS)} if status == 429 else None
    return JSONResponse({"error": detail}, status_code=status, headers=headers)


def _answer(
    id_start: str, kind: str, model: str, choices: list[dict[str, Any]], prompts: list[list[int]]
) -> JSONResponse:
    prompt_tokens = sum(len(prompt) for prompt in prompts)
    completion_tokens = sum(len(choice["token_ids"]) for choice in choices)
    # Sent as it is: validating our own answer again would cost more than sampling it.
    return JSONResponse(
        {
            "id": f"{id_start}-{next(_numbers)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "choices": [{"index": i, **choice} for i, choice in enumerate(choices)],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }
    )


def _training_fields(prompt: list[int], completion: Completion) -> dict[str, Any]:
    """The fields that both kinds of choices have: why it ended, and what training needs."""
    fields = {
        "finish_reason": completion.finish_reason,
        "token_ids": list(completion.token_ids),
        "prompt_token_ids": prompt,
        "token_logprobs": list(completion.logprobs),
        "temperature": completion.temperature,
        "policy_version": completion.policy_versions[0],
    }
    if len(set(completion.policy_versions)) > 1:
        fields["policy_versions"] = list(completion.policy_versions)
    if completion.expert_choices is not None:
        fields["routed_experts"] = encode_expert_choices(completion.expert_choices)
    return fields


def _token_entries(engine: Engine, completion: Completion) -> list[dict[str, Any]]:
    """The log-probs of a completion, in the form of a chat's choice."""
    tokens = completion.token_ids
    return [
        {
            "token": engine.decode([token], special=True),
            "logprob": logprob,
            "bytes": list(raw),
            "top_logprobs": [],
        }
        for token, logprob, raw in zip(
            tokens, completion.logprobs, engine.token_bytes(tokens), strict=True
        )
    ]


def _token_lists(engine: Engine, completion: Completion) -> dict[str, Any]:
    """The log-probs of a completion, in the form of a text completion's choice."""
    texts = [engine.decode([token], special=True) for token in completion.token_ids]
    return {
        "tokens": texts,
        "token_logprobs": list(completion.logprobs),
        "top_logprobs": None,
        "text_offset": [0, *itertools.accumulate(len(text) for text in texts)][:-1],
    }
