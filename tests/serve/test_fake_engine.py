"""The engine without a model: deterministic, and bound by the request as a real one is."""

from __future__ import annotations

import asyncio

import pytest
import torch

from gspo.core.errors import RequestError
from gspo.serve.engine import Completion, Request, SamplingParams
from gspo.serve.fake_engine import END, FakeEngine
from gspo.serve.verbatim import chat_tokens
from gspo.weights.receipt import Probe


def one(engine: FakeEngine, prompt: str, **params) -> Completion:
    request = Request(tuple(engine.tokenizer.encode(prompt)), SamplingParams(**params))
    return asyncio.run(engine.complete(request))[0]


def test_it_says_what_it_was_told_to():
    done = one(FakeEngine(lambda prompt, index: f"{prompt}{index}", logprob=-2.0), "hi")
    assert done.text == "hi0" and done.token_ids == (*map(ord, "hi0"), END)
    assert done.logprobs == (-2.0,) * 4
    assert (done.finish_reason, done.policy_versions, done.temperature) == ("stop", (0,) * 4, 1.0)


def test_replies_are_drawn_of_seed_prompt_and_index():
    request = Request((1, 2), SamplingParams(n=4, seed=3))
    first, again = (asyncio.run(FakeEngine().complete(request)) for _ in range(2))
    assert first == again and len({done.text for done in first}) > 1
    engine = FakeEngine()  # without a seed, a counter takes its place
    other = FakeEngine()
    texts = [one(engine, "a").text for _ in range(5)]
    assert len(set(texts)) > 1
    assert [one(other, "a").text for _ in range(5)] == texts
    assert [request.prompt for request in engine.requests] == [(97,)] * 5


@pytest.mark.parametrize(
    ("params", "text", "length", "reason"),
    [
        ({"max_tokens": 2}, "ab", 2, "length"),
        ({"max_tokens": 5}, "abcd", 5, "stop"),
        ({"stop": ("c",)}, "ab", 3, "stop"),
        ({"stop_token_ids": (ord("b"),)}, "ab", 2, "stop"),
        ({"skip_special_tokens": False}, "abcd\0", 5, "stop"),
    ],
)
def test_the_request_bounds_the_reply(params: dict, text: str, length: int, reason: str):
    done = one(FakeEngine(lambda prompt, index: "abcd"), "x", **params)
    assert (done.text, len(done.token_ids), done.finish_reason) == (text, length, reason)


async def test_it_says_what_was_asked_of_the_distribution():
    engine = FakeEngine(lambda prompt, index: "{}", logprob=-2.0)
    request = Request((1,), SamplingParams(top_logprobs=2, grammar="{}", top_p=0.5))
    (done,) = await engine.complete(request)
    assert done.altered_by == ("top_p", "grammar")
    assert done.top_logprobs == tuple(((token, -2.0),) for token in done.token_ids)
    pieces = [piece async for piece in engine.stream(request)]
    assert tuple(piece.top_logprobs[0] for piece in pieces) == done.top_logprobs


def test_the_next_prompt_extends_a_turn_as_it_was_sampled():
    engine = FakeEngine(lambda prompt, index: "yes")
    messages = [{"role": "user", "content": "?"}]
    prompt = chat_tokens(engine, messages)
    answer = asyncio.run(engine.complete(Request(tuple(prompt))))[0]
    longer = chat_tokens(engine, [*messages, {"role": "assistant", "content": answer.text}])
    assert longer[: len(prompt) + 4] == [*prompt, *answer.token_ids]
    assert b"".join(engine.tokenizer.token_bytes(engine.tokenizer.encode("é漢"))).decode() == "é漢"


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ((), {}, "the prompt is empty"),
        ((1,), {"max_tokens": 4096}, "context is 4096"),
        ((1,), {"min_tokens": 2}, "min_tokens: FakeEngine replies"),
        ((1,), {"grammar": "{}"}, "grammar: FakeEngine draws letters"),
        ((1,), {"expert_choices": True}, "return_routes: FakeEngine has no experts"),
    ],
)
def test_what_it_cannot_do_is_refused(prompt: tuple[int, ...], params: dict, message: str):
    with pytest.raises(RequestError, match=message):
        asyncio.run(FakeEngine().complete(Request(prompt, SamplingParams(**params))))


def test_its_score_of_a_probe_is_the_log_prob_of_its_tokens():
    probe = Probe(torch.tensor([97, 98, 99]), None)
    assert FakeEngine(logprob=-2.0).score(probe) == [-2.0, -2.0]


async def test_a_stream_has_the_tokens_one_by_one():
    request = Request((1, 2), SamplingParams(n=2, seed=3))
    done = await FakeEngine().complete(request)
    pieces = [piece async for piece in FakeEngine().stream(request)]
    for index, whole in enumerate(done):
        mine = [piece for piece in pieces if piece.index == index]
        assert tuple(token for piece in mine for token in piece.token_ids) == whole.token_ids
        assert tuple(x for piece in mine for x in piece.logprobs) == whole.logprobs
        assert [piece.completion for piece in mine] == [None] * (len(mine) - 1) + [whole]
