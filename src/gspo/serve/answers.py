"""Completions in the shapes of OpenAI's answers.

Beside OpenAI's fields, each choice carries what training needs: `token_ids`, `prompt_token_ids`,
`token_logprobs`, `temperature` and `policy_version`; `policy_versions`, one of each token, if
weights were published while it was sampled; with `return_routes: true`, an MoE engine's
`routed_experts`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

from gspo.data.expert_choices import encode_expert_choices
from gspo.serve.engine import Completion, Engine

_numbers = itertools.count(1)  # numbers the answers of this process


def head(id_start: str, kind: str, model: str) -> dict[str, Any]:
    """The fields that an answer and each chunk of its stream begin with."""
    number = next(_numbers)
    return {
        "id": f"{id_start}-{number}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def training_fields(completion: Completion) -> dict[str, Any]:
    """What training needs of a completion beside its tokens."""
    fields: dict[str, Any] = {
        "temperature": completion.temperature,
        "policy_version": completion.policy_versions[0],
    }
    if len(set(completion.policy_versions)) > 1:
        fields["policy_versions"] = list(completion.policy_versions)
    if completion.expert_choices is not None:
        fields["routed_experts"] = encode_expert_choices(completion.expert_choices)
    return fields


def token_fields(token_ids: Sequence[int], logprobs: Sequence[float]) -> dict[str, Any]:
    return {"token_ids": list(token_ids), "token_logprobs": list(logprobs)}


def chat_logprobs(
    engine: Engine,
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    before: Sequence[int] = (),
) -> dict[str, Any]:
    """Log-probs of tokens in the form of a chat's choice.

    Args:
        engine: what decodes them.
        token_ids: tokens that follow each other.
        logprobs: theirs.
        before: tokens before them: a tokenizer may drop the space that a text begins with.
    """
    raws = engine.token_bytes([*before, *token_ids])[len(before) :]
    entries = [
        _entry(engine, token, logprob, raw) | {"top_logprobs": []}
        for token, logprob, raw in zip(token_ids, logprobs, raws, strict=True)
    ]
    return {"content": entries, "refusal": None}


def _entry(engine: Engine, token: int, logprob: float, raw: bytes) -> dict[str, Any]:
    text = engine.decode([token], special=True)
    return {"token": text, "logprob": logprob, "bytes": list(raw)}


def text_logprobs(
    engine: Engine, token_ids: Sequence[int], logprobs: Sequence[float], offset: int = 0
) -> dict[str, Any]:
    """Log-probs of tokens in the form of a text completion's choice.

    Args:
        engine: what decodes them.
        token_ids: tokens that follow each other.
        logprobs: theirs.
        offset: characters of the tokens before them.
    """
    texts = [engine.decode([token], special=True) for token in token_ids]
    return {
        "tokens": texts,
        "token_logprobs": list(logprobs),
        "top_logprobs": None,
        "text_offset": list(itertools.accumulate(map(len, texts), initial=offset))[:-1],
    }
