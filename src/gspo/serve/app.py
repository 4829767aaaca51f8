"""The OpenAI-compatible routes before an engine.

Beside OpenAI's fields, every choice carries what training needs: `token_ids`,
`prompt_token_ids`, `token_logprobs`, `temperature` and `policy_version`; with
`return_routes: true`, an MoE engine's `routed_experts` too.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from gspo.core.errors import GspoError, RequestError
from gspo.data.expert_choices import encode_expert_choices
from gspo.serve.batcher import Batcher
from gspo.serve.engine import Completion, Engine
from gspo.serve.engine import Request as EngineRequest
from gspo.serve.schemas import ChatBody, CompletionBody

ServedNames = Callable[[], list[str]]


routes = APIRouter()
"""Functions of the module: FastAPI caches what it knows of them for good, closures too."""


@dataclass(frozen=True)
class _Served:
    """What an app answers with.

    Attributes:
        batcher: where requests go.
        names: the model names that requests may give.
        numbers: of the answers.
    """

    batcher: Batcher
    names: ServedNames
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def check(self, model: str) -> None:
        if model not in self.names():
            raise RequestError(f"no model {model!r} here; this server has {self.names()}", "model")


def create_app(batcher: Batcher, names: ServedNames) -> FastAPI:
    """The app that answers for `batcher`'s engine.

    Args:
        batcher: where requests go.
        names: the model names that requests may give.
    """
    app = FastAPI(title="gspo", docs_url=None, redoc_url=None)
    app.state.served = _Served(batcher, names)
    app.include_router(routes)
    _install_error_handlers(app)
    return app


@routes.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@routes.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    names = request.app.state.served.names()
    entries = [{"id": n, "object": "model", "created": 0, "owned_by": "gspo"} for n in names]
    return {"object": "list", "data": entries}


@routes.post("/v1/chat/completions")
async def chat(request: Request, body: ChatBody) -> JSONResponse:
    served: _Served = request.app.state.served
    engine = served.batcher.engine
    served.check(body.model)
    params = body.sampling(body.limit())
    engine.check_params(params)
    prompt = engine.encode_chat(body.text_messages())
    done = await served.batcher.complete(EngineRequest(tuple(prompt), params))
    choices = [_chat_choice(engine, i, prompt, c, body.logprobs) for i, c in enumerate(done)]
    number = f"chatcmpl-{next(served.numbers)}"
    return _answer("chat.completion", number, body.model, choices, [prompt])


@routes.post("/v1/completions")
async def completions(request: Request, body: CompletionBody) -> JSONResponse:
    served: _Served = request.app.state.served
    batcher, engine = served.batcher, served.batcher.engine
    served.check(body.model)
    params = body.sampling(body.max_tokens)
    engine.check_params(params)
    if body.logprobs not in (None, 0):
        raise RequestError("logprobs: only 0, the chosen tokens', is supported", "logprobs")
    special = body.add_special_tokens
    prompts = [
        engine.encode(p, special=special) if isinstance(p, str) else p for p in body.prompts()
    ]
    asked = [EngineRequest(tuple(prompt), params) for prompt in prompts]
    for one in asked:  # all of them, before the first is sampled
        batcher.check(one)
    answers = await asyncio.gather(*(batcher.complete(one) for one in asked))
    pairs = [(p, c) for p, done in zip(prompts, answers, strict=True) for c in done]
    with_logprobs = body.logprobs is not None
    choices = [_text_choice(engine, i, p, c, with_logprobs) for i, (p, c) in enumerate(pairs)]
    number = f"cmpl-{next(served.numbers)}"
    return _answer("text_completion", number, body.model, choices, prompts)


def _install_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(GspoError)
    async def refuse(request: Request, error: GspoError) -> JSONResponse:
        param = error.param if isinstance(error, RequestError) else None
        return _error(str(error), param, 400 if isinstance(error, RequestError) else 500)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return _error(f"{where}: {first['msg']}", where, 400)


def _error(message: str, param: str | None, status: int) -> JSONResponse:
    kind = "invalid_request_error" if status == 400 else "server_error"
    detail = {"message": message, "type": kind, "param": param, "code": None}
    return JSONResponse({"error": detail}, status_code=status)


def _answer(
    kind: str, number: str, model: str, choices: list[dict[str, Any]], prompts: list[list[int]]
) -> JSONResponse:
    prompt_tokens = sum(len(prompt) for prompt in prompts)
    completion_tokens = sum(len(choice["token_ids"]) for choice in choices)
    # Sent as it is: validating our own answer again would cost more than sampling it.
    return JSONResponse(
        {
            "id": number,
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "choices": choices,
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }
    )


def _training_fields(prompt: list[int], completion: Completion) -> dict[str, Any]:
    fields = {
        "token_ids": list(completion.token_ids),
        "prompt_token_ids": prompt,
        "token_logprobs": list(completion.logprobs),
        "temperature": completion.temperature,
        "policy_version": completion.policy_version,
    }
    if completion.expert_choices is not None:
        fields["routed_experts"] = encode_expert_choices(completion.expert_choices)
    return fields


def _chat_choice(
    engine: Engine, index: int, prompt: list[int], completion: Completion, logprobs: bool | None
) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": completion.text},
        "finish_reason": completion.finish_reason,
        "logprobs": {"content": _token_entries(engine, completion)} if logprobs else None,
        **_training_fields(prompt, completion),
    }


def _token_entries(engine: Engine, completion: Completion) -> list[dict[str, Any]]:
    tokens = completion.token_ids
    return [
        {
            "token": engine.token_text(token),
            "logprob": logprob,
            "bytes": list(raw),
            "top_logprobs": [],
        }
        for token, logprob, raw in zip(
            tokens, completion.logprobs, engine.token_bytes(tokens), strict=True
        )
    ]


def _text_choice(
    engine: Engine, index: int, prompt: list[int], completion: Completion, logprobs: bool
) -> dict[str, Any]:
    detail = None
    if logprobs:
        texts = [engine.token_text(token) for token in completion.token_ids]
        offsets = [0, *itertools.accumulate(len(text) for text in texts)][:-1]
        detail = {
            "tokens": texts,
            "token_logprobs": list(completion.logprobs),
            "top_logprobs": None,
            "text_offset": offsets,
        }
    return {
        "index": index,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "logprobs": detail,
        **_training_fields(prompt, completion),
    }
