"""The OpenAI-compatible routes before an engine.

Beside OpenAI's fields, each choice carries what training needs: `token_ids`,
`prompt_token_ids`, `token_logprobs`, `temperature` and `policy_version`; with
`return_routes: true`, an MoE engine's `routed_experts` too.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from gspo.core.errors import GspoError, RequestError
from gspo.data.expert_choices import encode_expert_choices
from gspo.serve.batcher import Batcher
from gspo.serve.engine import Completion, Engine, Request
from gspo.serve.schemas import ChatBody, CompletionBody

# The handlers are functions of the module, not closures: FastAPI never lets go of a handler.
router = fastapi.APIRouter()
_numbers = itertools.count(1)  # numbers the answers of this process


def create_app(batcher: Batcher, names: Callable[[], list[str]]) -> fastapi.FastAPI:
    """Make the app that answers for `batcher`'s engine.

    Args:
        batcher: where requests go.
        names: the model names that requests may give.
    """
    app = fastapi.FastAPI(title="gspo", docs_url=None, redoc_url=None)
    app.state.batcher, app.state.names = batcher, names
    app.include_router(router)
    for kind in (GspoError, RequestValidationError):
        app.add_exception_handler(kind, _refusal)
    return app


@router.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/v1/models")
async def models(http: fastapi.Request) -> dict[str, Any]:
    names = http.app.state.names()
    entries = [{"id": n, "object": "model", "created": 0, "owned_by": "gspo"} for n in names]
    return {"object": "list", "data": entries}


@router.post("/v1/chat/completions")
async def chat(http: fastapi.Request, body: ChatBody) -> JSONResponse:
    batcher = _batcher(http, body.model)
    engine, params = batcher.engine, body.sampling(body.limit())
    prompt = engine.encode_chat(body.text_messages())
    choices = []
    for completion in await batcher.complete(Request(tuple(prompt), params)):
        message = {"role": "assistant", "content": completion.text}
        logprobs = {"content": _token_entries(engine, completion)} if body.logprobs else None
        choices.append(
            {"message": message, "logprobs": logprobs, **_training_fields(prompt, completion)}
        )
    return _answer("chatcmpl", "chat.completion", body.model, choices, [prompt])


@router.post("/v1/completions")
async def completions(http: fastapi.Request, body: CompletionBody) -> JSONResponse:
    batcher = _batcher(http, body.model)
    engine, params = batcher.engine, body.sampling(body.max_tokens)
    if body.logprobs not in (None, 0):
        raise RequestError("logprobs: only 0, the chosen tokens', is supported", "logprobs")
    special = body.add_special_tokens
    prompts = [
        engine.encode(p, special=special) if isinstance(p, str) else p for p in body.prompts()
    ]
    requests = [Request(tuple(prompt), params) for prompt in prompts]
    for request in requests:  # all of them, before the first is sampled
        engine.check(request)
    answers = await asyncio.gather(*(batcher.complete(request) for request in requests))
    choices = []
    for prompt, answer in zip(prompts, answers, strict=True):
        for completion in answer:
            logprobs = None if body.logprobs is None else _token_lists(engine, completion)
            fields = {"text": completion.text, "logprobs": logprobs}
            choices.append(fields | _training_fields(prompt, completion))
    return _answer("cmpl", "text_completion", body.model, choices, prompts)


def _batcher(http: fastapi.Request, model: str) -> Batcher:
    """The batcher of this model.

    Raises:
        RequestError: the server has no such model.
    """
    names = http.app.state.names()
    if model not in names:
        raise RequestError(f"no model {model!r} here; this server has {names}", "model")
    return http.app.state.batcher


async def _refusal(http: fastapi.Request, error: Exception) -> JSONResponse:
    """An error in OpenAI's form: with status 400 if the request is to blame, else 500."""
    message, param, status = str(error), None, 500
    if isinstance(error, RequestError):
        param, status = error.param, 400
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        param, status = ".".join(str(name) for name in first["loc"] if name != "body"), 400
        message = f"{param}: {first['msg']}"
    kind = "invalid_request_error" if status == 400 else "server_error"
    detail = {"message": message, "type": kind, "param": param, "code": None}
    return JSONResponse({"error": detail}, status_code=status)


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
        "policy_version": completion.policy_version,
    }
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
