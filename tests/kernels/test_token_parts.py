"""A microbatch that threads divide among them, as ranks do (tests/train/many_ranks.py)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gspo as art
from gspo.data.packing import Microbatch
from gspo.kernels import token_parts
from gspo.kernels.token_parts import TokenParts
from gspo.policy.moe import ExpertChoices
from gspo.policy.policy import Policy
from gspo.policy.workers import Workers
from gspo.train.minibatches import microbatches, prepare
from gspo.train.settings import resolve
from objective.parts import Meeting
from support import choice, embedded, trajectory


class Group(NamedTuple):
    meeting: Meeting
    part: int


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives of threads."""

    def all_reduce(values: Tensor, group: Group) -> None:
        values.copy_(group.meeting.add(group.part, values))

    def all_gather(whole: Tensor, part: Tensor, group: Group) -> None:
        whole.zero_()
        whole.chunk(group.meeting.size)[group.part].copy_(part)
        all_reduce(whole, group)

    def reduce_scatter(part: Tensor, whole: Tensor, group: Group) -> None:
        part.copy_(group.meeting.add(group.part, whole).chunk(group.meeting.size)[group.part])

    monkeypatch.setattr(token_parts.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(token_parts, "_gather", all_gather)
    monkeypatch.setattr(token_parts, "_scatter_sum", reduce_scatter)


@given(tokens=st.integers(1, 40), size=st.integers(1, 9))
def test_parts_are_all_tokens_and_padding_behind_them(tokens: int, size: int) -> None:
    parts = [TokenParts(rank, size) for rank in range(size)]
    values = torch.arange(1, tokens + 1)
    joined = torch.cat([part.take(values) for part in parts])
    assert joined[:tokens].tolist() == values.tolist() and not joined[tokens:].any()
    assert sum(part.real(tokens)[1] for part in parts) == len(joined) - tokens
    assert all(
        part.take(values)[: len(part.take(values)) - part.real(tokens)[1]].all() for part in parts
    )
    if size > 1:
        held = [part.holds(values - 1, tokens) for part in parts]
        assert torch.stack([h for h in held if h is not None]).sum(0).tolist() == [1] * tokens


def groups() -> list[art.TrajectoryGroup]:
    """Two groups of two completions that share their prompts, 73 tokens in all."""
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(6, 100) for _ in range(count)]

    prompts = tokens(19), tokens(18)
    lengths = (3, 12), (14, 7)
    return [
        art.TrajectoryGroup([trajectory(float(n), choice(tokens(n), prompt)) for n in of_prompt])
        for prompt, of_prompt in zip(prompts, lengths, strict=True)
    ]


def scored(
    policy: Policy, microbatch: Microbatch, factors: Tensor, replay: Tensor | None = None
) -> tuple[Tensor, Tensor, ExpertChoices, dict[str, Tensor]]:
    """Log-probs, entropies, expert choices, and the gradient of a weighted sum of log-probs."""
    balance = torch.linspace(0, 1e-2, 16).view(2, 8)
    with policy.routers.watch(replay, balance=balance, copies=microbatch.copies) as choices:
        out = policy.logprobs(microbatch)
    ((out.logprobs @ factors + choices.balance) / policy.workers.parts.size).backward()
    gradients = {name: weight.grad for name, weight in policy.trainable.items()}
    return (
        out.logprobs.detach(),
        out.entropy,
        choices,
        {n: g for n, g in gradients.items() if g is not None},
    )


@pytest.mark.parametrize(("size", "checkpointing"), [(3, True)])
def test_parts_have_the_log_probs_gradients_and_experts_of_the_whole(
    met: None, size: int, checkpointing: bool
) -> None:
    """With shared prompts, replayed experts, and a part that ends in padding."""
    policy = embedded(activation_checkpointing=checkpointing)
    settings = resolve()
    batch = prepare(groups(), settings, context=policy.context)
    policy.shares_prompts = True
    (microbatch,) = microbatches(policy, batch.samples, settings, replay=False)
    assert microbatch.token_count < microbatch.sample_tokens and microbatch.token_count % size
    factors = torch.linspace(-1, 1, len(microbatch.targets))
    replay = torch.randint(
        0, 8, (microbatch.token_count, 2, 2), generator=torch.Generator().manual_seed(0)
    )
    replay[:, :, 1] = (replay[:, :, 0] + 1) % 8  # two experts each
    logprobs, entropy, choices, gradients = scored(policy, microbatch, factors, replay)
    meeting = Meeting(size)

    policies = [embedded(activation_checkpointing=checkpointing) for _ in range(size)]

    def work(part: int, _: Callable[[Tensor], Tensor]):
        own = policies[part]
        own.workers = Workers()
        own.workers.size, own.workers.parts = size, TokenParts(part, size, Group(meeting, part))
        return scored(own, microbatch, factors, replay)

    found = meeting.each(work)
    for own_logprobs, own_entropy, own_choices, _ in found:
        assert torch.allclose(own_logprobs, logprobs, atol=1e-5)
        assert torch.allclose(own_entropy, entropy, atol=1e-5)
        assert torch.equal(own_choices.used(), choices.used())
        assert torch.equal(own_choices.loads(), choices.loads())
        assert torch.allclose(
            torch.as_tensor(own_choices.balance), torch.as_tensor(choices.balance)
        )
    for name, gradient in gradients.items():
        together = torch.stack([of_part[name] for *_, of_part in found]).sum(0)
        assert torch.allclose(together, gradient, atol=1e-5 * gradient.abs().max().item()), name
