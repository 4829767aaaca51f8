"""Completions that are decoded together, step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gspo.kernels.prompt_cache import SharedPrompts
from gspo.policy.policy import Policy
from gspo.serve import batch
from gspo.serve import batch as module
from gspo.serve.decoding import OpenCompletion
from gspo.serve.engine import Request, SamplingParams
from gspo.serve.selfcheck import make_exact
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


def test_a_finished_completion_is_not_fed_beyond_the_context(monkeypatch: pytest.MonkeyPatch):
    """Positions that a model does not have are an error, on a GPU one that ends the process."""
    monkeypatch.setattr(batch, "_DEAD", {"cpu": 1000})
    engine = TorchEngine(embedded())
    engine.policy.context = 12
    fed: list[int] = []
    advance = SharedPrompts.advance

    def seen(cache: SharedPrompts, tokens: torch.Tensor) -> torch.Tensor:
        fed.append(int(cache.lengths.max()))
        return advance(cache, tokens)

    monkeypatch.setattr(SharedPrompts, "advance", seen)
    params = SamplingParams(n=1, max_tokens=9, seed=0, ignore_eos=True)
    requests = [Request(prompt, params) for prompt in ((6, 7, 8), (6,))]
    assert [len(own[0].token_ids) for own in engine.generate(requests)] == [9, 9]
    assert max(fed) < 12 and len(fed) == 8


class Asked(TorchDispatchMode):
    """Counts how often a number is read from the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_reads_no_single_number(engine: TorchEngine):
    """On a device each would be a wait. What ended is read once, together."""
    running = engine.batch()
    with engine.computing():
        running.step(opened(engine, 5, 3))
        with Asked() as asked:
            while running.step([]):
                pass
    assert asked.count == 0


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


def test_a_long_prompt_is_read_in_pieces_beside_those_that_run(monkeypatch: pytest.MonkeyPatch):
    """Exact: neither the pieces nor a neighbour's prompt change a bit; nobody waits for them."""
    exact = TorchEngine(embedded())
    make_exact(exact, required=True)
    monkeypatch.setattr(module, "PROMPT_TOKENS", (64, 64))
    text = tuple(6 + i * i % 50 for i in range(450))
    params = SamplingParams(n=2, max_tokens=3, seed=1, ignore_eos=True, expert_choices=True)
    asked = Request(text, params)
    long, gone = exact.opened(asked), exact.opened(Request(text[:300], params))
    short, late = opened(exact, 12), opened(exact, 2, seed=1)
    batch = exact.batch()
    with exact.computing():
        batch.step(short)
        for step in range(1, 9):
            batch.step([*long, *gone] if step == 1 else late if step == 4 else [])
            assert len(batch.sampled(short[0], 0)[0]) == step + 1
            if step == 3:
                for completion in gone:
                    batch.cancel(completion)
            assert set(map(id, batch.busy)) >= set(map(id, long))
            assert batch.sampled(long[0], 0) == ((), ())
        assert late[0].finish == "length"  # it began after the long prompt and did not wait for it
        while batch.step([]):
            pass
    monkeypatch.setattr(module, "PROMPT_TOKENS", (10**6, 10**6))
    whole = exact.generate([asked])[0]
    for one, other in zip(map(exact.whole, long), whole, strict=True):
        assert one == other and one.expert_choices is not None
        np.testing.assert_array_equal(one.expert_choices, other.expert_choices)
    assert exact.whole(late[0]) == exact.generate([late[0].request])[0][0]


@pytest.mark.parametrize("changes", [1, 5])
def test_weights_that_change_in_a_prompt_begin_it_again_in_pieces(
    changes: int, monkeypatch: pytest.MonkeyPatch
):
    """One change reads no more in a step than before; and it ends though they change forever."""
    policy = embedded()
    changing = TorchEngine(policy)
    monkeypatch.setattr(module, "PROMPT_TOKENS", (32, 32))
    sizes: list[int] = []
    feed = SharedPrompts.feed

    def fed(cache: SharedPrompts, tokens: torch.Tensor) -> torch.Tensor:
        sizes.append(tokens.numel())
        return feed(cache, tokens)

    monkeypatch.setattr(SharedPrompts, "feed", fed)
    text = tuple(6 + i % 50 for i in range(400))
    params = SamplingParams(max_tokens=3, seed=1, ignore_eos=True)
    short = opened(changing, 60)
    done, batch = changing.opened(Request(text, params)), changing.batch()
    with changing.computing():
        batch.step(short)
        batch.step(done)
        for version in range(1, changes + 1):
            policy.version = version
            for weight in policy.trainable.values():
                weight.mul_(1.02)
            batch.step([])
        while batch.busy:
            batch.step([])
    assert done[0].versions == (changes,) * 3 and len(short[0].tokens) == 60
    pieces = [size for size in sizes if size > 3]  # the others are decode steps
    assert pieces[0] == pieces[1] == 32 and max(pieces) == min(400, 32 * 2 ** (changes - 1))
    assert done[0].logprobs == pytest.approx(
        changing.generate([Request(text, params)])[0][0].logprobs, abs=1e-5
    )
