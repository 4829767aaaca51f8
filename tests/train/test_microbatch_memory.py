"""Microbatches as large as a GPU has memory for; the memory here is made up."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from gspo.policy.policy import Policy
from gspo.train import microbatch_memory
from gspo.train.microbatch_memory import FEWEST, MOST, microbatch_tokens
from support import embedded


class Memory:
    """A card on which a token takes `each` bytes, and a microbatch `fixed` beside."""

    def __init__(self, free: float, each: int, fixed: int = 0):
        self.free, self.each, self.fixed = free, each, fixed
        self.tokens: list[int] = []

    def peak(self, _device: torch.device) -> int:
        return self.fixed + self.each * self.tokens[-1]


@pytest.fixture
def policy() -> Policy:
    return embedded()


def on(memory: Memory, policy: Policy, patch: pytest.MonkeyPatch) -> int:
    original = microbatch_memory._random

    def random(policy: Policy, tokens: int):
        microbatch = original(policy, tokens // 16)
        memory.tokens.append(tokens)
        assert microbatch.token_count == tokens // 16
        return microbatch

    cuda = SimpleNamespace(
        reset_peak_memory_stats=lambda _device: None,
        memory_allocated=lambda _device: 0,
        memory_reserved=lambda _device: 0,
        max_memory_allocated=memory.peak,
        mem_get_info=lambda _device: (memory.free, memory.free),
        empty_cache=lambda: None,
    )
    patch.setattr(microbatch_memory, "_random", random)
    patch.setattr(torch, "cuda", cuda)
    return microbatch_tokens(policy)


def test_what_fits_is_in_the_free_memory_and_measured_once(policy, monkeypatch):
    state = 3 * sum(p.numel() * 4 for p in policy.trainable.values())
    memory = Memory(free=state + 10_000_000_000, each=1_000_000, fixed=500_000_000)
    assert on(memory, policy, monkeypatch) == 7500
    assert 7500 * memory.each + memory.fixed <= microbatch_memory.SHARE * 1e10
    assert all(p.grad is None for p in policy.trainable.values())
    memory.each *= 2
    assert microbatch_tokens(policy) == 7500 and len(memory.tokens) == 2


@pytest.mark.parametrize(("free", "fits"), [(1e6, FEWEST), (1e15, MOST)])
def test_there_are_neither_too_few_nor_too_many(free: float, fits: int, policy, monkeypatch):
    assert on(Memory(free, each=1_000_000), policy, monkeypatch) == fits


def test_a_card_too_small_for_the_trial_gets_the_fewest(policy, monkeypatch):
    memory = Memory(1e9, each=1)

    def full(_device: torch.device) -> Iterator[int]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory, "peak", full)
    assert on(memory, policy, monkeypatch) == FEWEST
