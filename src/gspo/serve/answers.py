"""Completions in the shapes of OpenAI's answers.

Beside OpenAI's fields, each choice carries what training needs: `token_ids`, `prompt_token_ids`,
`token_logprobs`, `temperature` and `policy_version`; `policy_versions`, one of each token, if
weights were published while it was sampled; `altered_by`, if tokens were drawn from another
distribution than that of the log-probs; with `return_routes: true`, an MoE engine's
`routed_experts`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

from gspo.data.expert_choices import encode_expert_choices
from gspo.serve.engine import Completion, Engine, Piece

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
    if completion.altered_by:
        fields["altered_by"] = list(completion.altered_by)
    if completion.expert_choices is not None:
        fields["routed_experts"] = encode_expert_choices(completion.expert_choices)
    return fields


def token_fields(token_ids: Sequence[int], logprobs: Sequence[float]) -> dict[str, Any]:
    return {"token_ids": list(token_ids), "token_logprobs": list(logprobs)}


def chat_logprobs(
    engine: Engine, sampled: Completion | Piece, before: Sequence[int] = ()
) -> dict[str, Any]:
    """Log-probs of tokens in the form of a chat's choice.

    Args:
        engine: what decodes them.
        sampled: the tokens.
        before: tokens before them: a tokenizer may drop the space that a text begins with.
    """
    raws = engine.token_bytes([*before, *sampled.token_ids])[len(before) :]
    entries = []
    for i, (token, logprob) in enumerate(zip(sampled.token_ids, sampled.logprobs, strict=True)):
        top = [
            _entry(engine, other, its, *engine.token_bytes([other]))
            for others in sampled.top_logprobs[i : i + 1]
            for other, its in others
        ]
        entries.append(_entry(engine, token, logprob, raws[i]) | {"top_logprobs": top})
    return {"content": entries, "refusal": None}


def _entry(engine: Engine, token: int, logprob: float, raw: bytes) -> dict[str, Any]:
    text = engine.decode([token], special=True)
    return {"token": text, "logprob": logprob, "bytes": list(raw)}


def text_logprobs(engine: Engine, sampled: Completion | Piece, offset: int = 0) -> dict[str, Any]:
    """Log-probs of tokens in the form of a text completion's choice.

    Args:
        engine: what decodes them.
        sampled: the tokens.
        offset: characters of the tokens before them.
    """
    texts = [engine.decode([token], special=True) for token in sampled.token_ids]
    top = [
        {engine.decode([token], special=True): logprob for token, logprob in reversed(others)}
        for others in sampled.top_logprobs
    ]
    return {
        "tokens": texts,
        "token_logprobs": list(sampled.logprobs),
        "top_logprobs": top or None,
        "text_offset": list(itertools.accumulate(map(len, texts), initial=offset))[:-1],
    }
