"""Completions that are decoded together, step by step."""

from __future__ import annotations

import pytest
import torch

from gspo.policy.policy import Policy
from gspo.serve.decoding import OpenCompletion
from gspo.serve.engine import Request, SamplingParams
from gspo.serve.torch_engine import TorchEngine
from support import embedded


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    return TorchEngine(embedded())


def opened(engine: TorchEngine, length: int, n: int = 1, seed: int = 0) -> list[OpenCompletion]:
    params = SamplingParams(n=n, max_tokens=length, seed=seed, ignore_eos=True)
    return engine.opened(Request((6, 7, 8), params))


def test_they_join_end_and_are_cancelled_between_steps(engine: TorchEngine):
    long, short, late = opened(engine, 9, 2), opened(engine, 2, seed=1), opened(engine, 3, seed=2)
    alone = engine.generate([late[0].request])[0][0]
    batch = engine.batch()
    with engine.computing():
        assert not batch.step([])  # nothing to do
        assert batch.step([*long, *short])
        assert [len(values) for values in batch.sampled(long[0], 0)] == [1, 1]
        assert batch.sampled(late[0], 0) == ((), ())  # it waits
        assert batch.step(late)
        assert short[0].finish == "length" and batch.busy == [*long, *late]
        batch.cancel(long[1])
        assert batch.busy == [long[0], *late]
        batch.step([])
        assert [len(values) for values in batch.sampled(long[0], 1)] == [2, 2]
        batch.step([])
    assert late[0].tokens == alone.token_ids
    assert late[0].logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    assert batch.sampled(late[0], 2)[0] == alone.token_ids[2:]
    batch.cancel(long[0])
    assert batch.busy == []
    with engine.computing():
        assert not batch.step([])


def test_a_step_is_of_one_version(engine: TorchEngine):
    """A token's log-prob is of the weights whose version it has."""
    policy: Policy = embedded()
    changing = TorchEngine(policy)
    done = opened(changing, 6)
    batch = changing.batch()
    with changing.computing():
        for step in range(6):
            if step == 3:
                policy.version = 7
                for weight in policy.trainable.values():
                    weight.mul_(1.1)
            batch.step(done if step == 0 else [])
    same = engine.generate([done[0].request])[0][0]
    assert done[0].versions == (0, 0, 0, 7, 7, 7)
    assert done[0].logprobs[:3] == same.logprobs[:3]
    assert done[0].logprobs[3] != same.logprobs[3]
    tokens = torch.tensor([[6, 7, 8, *done[0].tokens]])
    assert not torch.isnan(tokens.float()).any()
