"""Bias, penalties, min_tokens and grammars against loops over single tokens in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo.policy.policy import Policy
from gspo.serve.decoding import OpenCompletion
from gspo.serve.engine import Request, SamplingParams
from gspo.serve.logit_rules import LogitRules
from gspo.serve.torch_engine import TorchEngine
from gspo.serve.verbatim import chat_tokens
from support import embedded

V = 23
END = 4
ENDS = torch.arange(V) == END


def opened(prompt: list[int], **params: Any) -> OpenCompletion:
    return OpenCompletion(Request(tuple(prompt), SamplingParams(**params)), 99, (0, 0))


def by_hand(logits: list[float], completion: OpenCompletion, tokens: list[int]) -> list[float]:
    """One token at a time, in the order that the docstring of SamplingParams gives."""
    params, out = completion.params, []
    for token, logit in enumerate(logits):
        logit += sum(bias for number, bias in params.logit_bias if number == token)
        if token in tokens or token in completion.request.prompt:
            positive = logit > 0
            logit = (
                logit / params.repetition_penalty if positive else logit * params.repetition_penalty
            )
        logit -= params.frequency_penalty * tokens.count(token)
        logit -= params.presence_penalty * (token in tokens)
        ends = token in completion.ends or (token == END and not params.ignore_eos)
        out.append(-math.inf if ends and len(tokens) < params.min_tokens else logit)
    return out


PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.floats(0.01, 100),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100), max_size=3).map(
            lambda chosen: tuple(chosen.items())
        ),
        "min_tokens": st.integers(0, 4),
        "ignore_eos": st.booleans(),
    },
)
IDS = st.integers(0, V - 1)
ROW = st.tuples(st.lists(IDS, min_size=1, max_size=5), st.lists(IDS, max_size=6), PARAMS)


def state(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and counts as `Running` has them: what is behind the count means nothing."""
    tokens = torch.full((len(rows), 8), 9, dtype=torch.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return tokens, torch.tensor([len(row) for row in rows])


@settings(max_examples=80, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=5), st.integers(0, 99))
def test_they_are_what_they_say(rows: list[tuple[list[int], list[int], dict]], seed: int):
    """And a row's bits don't depend on the other rows."""
    logits = torch.randn(len(rows), V, generator=torch.Generator().manual_seed(seed)) * 5
    completions = [opened(prompt, **params) for prompt, _, params in rows]
    written = [tokens for _, tokens, _ in rows]
    before = logits.clone()
    rules = LogitRules(completions, ENDS)
    changed = rules.apply(logits, *state(written))
    assert torch.equal(logits, before)
    out = logits.clone()
    if changed is not None:
        out[rules.rows] = changed
    for i, completion in enumerate(completions):
        expected = by_hand(logits[i].double().tolist(), completion, written[i])
        got = out[i].double()
        torch.testing.assert_close(got, torch.tensor(expected).double(), rtol=1e-5, atol=1e-4)
        alone = LogitRules([completion], ENDS).apply(logits[i : i + 1], *state([written[i]]))
        assert torch.equal(out[i], logits[i] if alone is None else alone[0])


def test_what_asks_for_nothing_costs_nothing():
    plain = [opened([1], top_p=0.5, top_k=3, min_p=0.1, top_logprobs=2, temperature=0)] * 3
    rules = LogitRules(plain, ENDS)
    assert len(rules.rows) == 0
    assert rules.apply(torch.zeros(3, V), *state([[], [1], [2, 3]])) is None
    late = LogitRules([opened([1], min_tokens=2)], ENDS)
    assert late.apply(torch.zeros(1, V), *state([[1, 2]])) is None  # long enough
    assert late.apply(torch.zeros(1, V), *state([[1]])) is not None


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    return TorchEngine(embedded())


def test_a_penalty_over_the_engine_is_the_penalty_by_hand(engine: TorchEngine):
    """Greedy: each token is the likeliest after the penalties of what was before it."""
    policy: Policy = engine.policy
    prompt = tuple(chat_tokens(engine, [{"role": "user", "content": "918273"}]))
    params = SamplingParams(
        temperature=0, max_tokens=14, ignore_eos=True, presence_penalty=0.7,
        frequency_penalty=1.5, repetition_penalty=1.2, logit_bias=((9, 2.0),), top_logprobs=2,
    )  # fmt: skip
    (done,) = engine.generate([Request(prompt, params)])[0]
    assert done.altered_by == (
        "temperature", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"
    )  # fmt: skip
    with torch.no_grad():
        logits = policy.lm(torch.tensor([[*prompt, *done.token_ids]])).logits[0].double()
    completion = OpenCompletion(Request(prompt, params), 99, (0, 0))
    moved = 0
    for i, token in enumerate(done.token_ids):
        plain = logits[len(prompt) + i - 1]
        changed = by_hand(plain.tolist(), completion, list(done.token_ids[:i]))
        assert max(changed) - changed[token] < 1e-3
        logprobs = plain.log_softmax(-1)  # of the unchanged logits
        assert done.logprobs[i] == pytest.approx(logprobs[token].item(), abs=1e-4)
        top = logprobs.topk(2)
        assert [number for number, _ in done.top_logprobs[i]] == top.indices.tolist()
        got = [value for _, value in done.top_logprobs[i]]
        assert got == pytest.approx(top.values.tolist(), abs=1e-4)
        moved += token != top.indices[0].item()
    assert moved > 2


def test_a_drawn_tokens_log_prob_is_among_the_top_ones_to_the_bit(engine: TorchEngine):
    params = SamplingParams(n=4, max_tokens=9, seed=1, top_logprobs=20, temperature=0.5)
    plain = SamplingParams(n=4, max_tokens=9, seed=1, temperature=0.5)
    asked, beside = engine.generate([Request((6, 7), params), Request((6, 7), plain)])
    found = 0
    for completion in asked:
        assert len(completion.top_logprobs) == len(completion.token_ids)
        columns = zip(
            completion.token_ids, completion.logprobs, completion.top_logprobs, strict=True
        )
        for token, logprob, top in columns:
            assert len(top) == 20 and [v for _, v in top] == sorted((v for _, v in top))[::-1]
            found += dict(top).get(token) == logprob
    assert found > 10
    assert all(completion.top_logprobs == () for completion in beside)
    assert [c.logprobs for c in asked] == [c.logprobs for c in beside]
