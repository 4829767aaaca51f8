"""Bodies that are wrong, by the thousand: an error in OpenAI's form each time, never a fault of the
server's own."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from gspo.serve.fake_engine import FakeEngine
from gspo.serve.local_client import in_process_client
from support import app_of

GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "m",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        "n": 2,
        "max_tokens": 3,
        "stop": ["a"],
        "stream_options": {"include_usage": True},
        "stream": True,
        "logprobs": True,
        "seed": 1,
    },
    "/v1/completions": {"model": "m", "prompt": ["ab", "cd"], "max_tokens": 3, "logprobs": 0},
    "/episodes/e1/v1/chat/completions": {
        "model": "m",
        "messages": [
            {"role": "user", "content": "hello"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "c",
                        "type": "function",
                        "function": {"name": "f", "arguments": '{"a": 1}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "c", "content": "2"},
        ],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "f",
                    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
                },
            }
        ],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"type": "object"}},
        },
        "logit_bias": {"97": 3},
        "top_logprobs": 2,
        "logprobs": True,
    },
    "/episodes/e1/reward": {"reward": 1.0},
    "/v1/responses": {
        "model": "m",
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}],
        "max_output_tokens": 3,
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
    },
    "/tokenize": {"model": "m", "messages": [{"role": "user", "content": "hello"}]},
    "/detokenize": {"model": "m", "tokens": [97, 98]},
}
NAMES = [
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "stop",
    "seed",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "stream",
    "stream_options",
    "tools",
    "tool_choice",
    "response_format",
    "parallel_tool_calls",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "stop_token_ids",
    "skip_special_tokens",
    "add_special_tokens",
    "chat_template_kwargs",
    "continue_final_message",
    "return_token_ids",
    "return_routes",
    "ignore_eos",
    "messages",
    "prompt",
    "model",
    "tokens",
    "user",
    "metadata",
    "echo",
]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, -(2**63), 0.5, 1e308, 1e-320),
    *(float("nan"), float("inf"), -float("inf"), "", "a", "\x00", "\ud800", "x" * 5000, "❤" * 99),
    *([], [None], [[]], [[1], "a"], [2**70], [-1], ["\udfff"], {}, {"": None}, {"a": {"b": []}}),
    [{"role": "user"}],
    [{"role": "user", "content": "\ud83d"}],
    [{"role": 5, "content": []}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/x"}}},
    [{"type": "function", "function": {"name": "f", "parameters": {"type": "what"}}}],
    {"97": 1e9, "-1": 3, "x": 2},
]


def wrong_body(rng: random.Random, path: str) -> bytes:
    """A body in which one thing or several are wrong, or one that is no JSON."""
    body = json.loads(json.dumps(GOOD[path]))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        target: Any = body
        while rng.random() < 0.4:  # somewhere inside
            inner = [v for v in (target.values() if isinstance(target, dict) else target) if v]
            inner = [v for v in inner if isinstance(v, dict | list)]
            if not inner:
                break
            target = rng.choice(inner)
        odd = copy.deepcopy(rng.choice(ODD))
        if isinstance(target, list):
            target[rng.randrange(len(target)) :] = [odd]
        elif rng.random() < 0.15 and target:
            del target[rng.choice([*target])]
        else:
            target[rng.choice(NAMES if target is body else [*target, "odd"])] = odd
    sent = json.dumps(body).encode()
    kind = rng.random()
    if kind < 0.08:  # cut, or with a byte of another kind
        at = rng.randrange(len(sent))
        sent = sent[:at] + rng.choice([b"", bytes([rng.randrange(256)]), sent[at + 1 :]])
    elif kind < 0.1:
        sent = rng.choice([b"", b"null", b"[]", b'"x"', b"3", b"[" * 100_000, b"\xff\xfe{}"])
    elif kind < 0.11:
        sent = b'{"model": "m", "messages": ' + b'[{"content":' * 50_000
    return sent


async def outcomes(count: int, seed: int) -> dict[int, int]:
    """Send so many wrong bodies, and count the statuses."""
    rng, found = random.Random(seed), {}
    async with in_process_client(app_of(FakeEngine(lambda prompt, index: "abc"))) as client:
        for _ in range(count):
            path = rng.choice([*GOOD])
            body = wrong_body(rng, path)
            kind = rng.choice(["application/json"] * 9 + ["text/plain", ""])
            answer: Any = await client._client.post(
                f"http://gspo.local{path}", content=body, headers={"content-type": kind}
            )
            status = answer.status_code
            found[status] = found.get(status, 0) + 1
            if status == 200:
                failed = any(mark in answer.content for mark in (b'"error":{', b"event: error"))
                assert not failed, (path, body, answer.content)
                continue
            assert 400 <= status < 500, (path, body, answer.content)
            error = answer.json()
            assert [*error] == ["error"], (path, body, error)
            assert {*error["error"]} == {"message", "type", "param", "code"}, (path, body, error)
            assert error["error"]["message"], (path, body)
    return found


async def test_wrong_bodies_are_refused():
    found = await outcomes(400, 1)
    assert found[400] > 100 and found[200] > 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
async def test_wrong_bodies_are_refused_by_the_thousand(seed: int):
    found = await outcomes(2000, 10 + seed)
    assert found[400] > 500


@pytest.mark.parametrize("depth", [50, 150, 400, 700, 900, 1900])
async def test_a_value_may_be_nested_as_deep_as_it_likes(depth: int):
    deep = "[" * depth + "]" * depth
    call = {"function": {"name": "f", "arguments": deep}}
    says = '<tool_call>{"name": "f", "arguments": {"a": ' + deep + "}}</tool_call>"
    bodies = [
        {"messages": [{"role": "user", "content": "x", "y": "DEEP"}]},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]},
        {"metadata": "DEEP"},
        {"chat_template_kwargs": {"a": "DEEP"}},
        {"tools": [{"function": {"name": "f", "parameters": {"a": "DEEP"}}}]},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": "DEEP"}}}},
    ]
    async with in_process_client(app_of(FakeEngine(lambda prompt, index: says))) as client:
        for number, body in enumerate(bodies):
            asked = json.dumps({"model": "m", "messages": [{"role": "user"}], **body})
            answer: Any = await client._client.post(
                f"http://gspo.local/episodes/e{number}/v1/chat/completions",
                content=asked.replace('"DEEP"', deep).encode(),
                headers={"content-type": "application/json"},
            )
            fine = depth <= 50 or number == 1
            assert answer.status_code == (200 if fine else 400), (number, answer.content[:300])


# The document of the routes, and what schemathesis makes of it: requests that it allows and that it
# forbids; the answers must be as it says. `call_and_validate` holds the status (none of 500), the
# kind and the shape of each answer against the document.
document = schemathesis.openapi.from_asgi("/openapi.json", app_of(FakeEngine()))
QUICK = settings(
    max_examples=8,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@document.parametrize()
@QUICK
def test_answers_are_as_the_document_says(case: schemathesis.Case):
    case.call_and_validate(checks=CHECKS)


@pytest.mark.slow
@document.parametrize()
@settings(QUICK, max_examples=500)
def test_answers_are_as_the_whole_document_says(case: schemathesis.Case):
    case.call_and_validate(checks=CHECKS)
