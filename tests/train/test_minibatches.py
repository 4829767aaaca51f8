"""A rollout batch, its minibatches, and how many tokens a microbatch has."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from gspo import TrajectoryGroup
from gspo.core.errors import DataError, SampleTooLongError
from gspo.data.packing import pack
from gspo.data.sample import flat, unit_count
from gspo.dev import TrainConfig
from gspo.objective import policy_loss
from gspo.train.batch_metrics import warn_of_unread
from gspo.train.minibatches import (
    ACTIVATION_BYTES,
    activation_bytes,
    minibatches,
    prepare,
    shaped_reward,
    token_budget,
    with_gradient,
)
from gspo.train.settings import resolve
from support import choice, trajectory

CENTRED = resolve(options=TrainConfig(scale_rewards=False))


def groups(*rewards: tuple[float, ...]) -> list[TrajectoryGroup]:
    return [TrajectoryGroup([trajectory(r) for r in own]) for own in rewards]


def order(parts) -> list[int]:
    return [samples[0].trajectory_id for part in parts for samples in part]


def test_advantages_are_standardised_per_group():
    batch = prepare(groups((1, 0), (5, 5), (0, 4)), context=99)
    assert [s[0].advantage for s in batch.samples] == [1, -1, 0, 0, -1, 1]
    assert batch.flat_groups == 1


def test_unscaled_advantages_are_centred_only():
    batch = prepare(groups((1, 0), (0, 4)), CENTRED, context=99)
    assert [s[0].advantage for s in batch.samples] == [0.5, -0.5, -2, 2]


def test_an_advantage_beyond_float32_is_refused_with_the_group():
    huge = groups((0, 1), (1e99, 1.0))
    assert [s[0].advantage for s in prepare(huge, context=99).samples] == [-1, 1, 1, -1]
    with pytest.raises(DataError, match=r"group 1: an advantage is 5e\+98.*divide the rewards"):
        prepare(huge, CENTRED, context=99)


@pytest.mark.parametrize(("length", "fall"), [(79, 0.0), (80, 0.0), (90, 0.5), (100, 1), (150, 1)])
def test_the_overlong_punishment_falls_linearly_to_minus_one(length: int, fall: float):
    long = trajectory(2.0, choice([4] * length))
    options = TrainConfig(overlong_max_tokens=100, overlong_cache=20)
    assert shaped_reward(long, options) == 2.0 - fall
    assert shaped_reward(long, TrainConfig()) == 2.0


def test_the_overlong_punishment_is_in_the_advantages_and_not_in_the_rewards():
    """Lengths 2 and 8 of at most 10, cache 4: 8 tokens cost 0.5. All turns count."""
    short, long = choice([4, 5], [1]), [choice([4] * 5, [1]), choice([5] * 3, [2])]
    group = TrajectoryGroup([trajectory(0.25, short), trajectory(1.0, *long)])
    options = TrainConfig(scale_rewards=False, overlong_max_tokens=10, overlong_cache=4)
    batch = prepare([group], resolve(options=options), context=99)
    assert batch.rewards == (0.25, 1.0)
    assert [samples[0].advantage for samples in batch.samples] == [-0.125, 0.125]


def test_minibatches_keep_groups_together_and_lose_nothing():
    batch = prepare(groups(*[(0, 1, 2, 3)] * 8), context=99)
    parts = minibatches(batch, 4, seed=1)
    assert [len(part) for part in parts] == [8, 8, 8, 8]
    for part in parts:
        assert len({s[0].group_id for s in part}) == 2
    assert sorted(order(parts)) == list(range(32))
    assert order(parts) == order(minibatches(batch, 4, seed=1))
    assert order(parts) != order(minibatches(batch, 4, seed=2))


def test_fewer_trajectories_than_minibatches():
    parts = minibatches(prepare(groups((0, 1)), context=99), 4, seed=0)
    assert [len(part) for part in parts] == [1, 1]


def test_too_long_is_named_or_dropped_by_choice():
    batch = groups((0.0, 1.0))
    batch[0].trajectories.append(trajectory(2.0, choice([5] * 50)))
    with pytest.raises(SampleTooLongError, match=r"trajectory 2 has 53 tokens.*context is 20"):
        prepare(batch, context=20)
    drops = resolve(options=TrainConfig(on_too_long="drop"))
    kept = prepare(batch, drops, context=20)
    assert (len(kept.samples), kept.dropped) == (2, 1)
    # Its reward still was part of the group's mean.
    assert kept.samples[1][0].advantage == pytest.approx(0.0)


# Tokens of a microbatch, by the memory that their activations take


def shape(width: int, layers: int) -> SimpleNamespace:
    return SimpleNamespace(hidden_size=width, num_hidden_layers=layers)


def test_what_fits_is_within_the_bytes():
    model = shape(896, 24)
    fits = token_budget(model, False)
    each = activation_bytes(model, False)
    assert fits * each <= ACTIVATION_BYTES < (fits + 1) * each


def test_checkpointing_keeps_less_and_fits_more():
    model = shape(2048, 24)
    assert activation_bytes(model, True) < activation_bytes(model, False)
    assert token_budget(model, True) > token_budget(model, False)


def test_no_model_has_too_few_or_too_many():
    assert token_budget(shape(65_536, 200), False) == 256
    assert token_budget(shape(8, 1), False) == 16_384


# Turns with advantages of their own.

SAMPO = TrainConfig(algorithm="sampo", epsilon=0.05, turn_weight=0.7, turn_discount=0.9)


def conversations(seed: int) -> list[TrajectoryGroup]:
    """Groups with turn rewards, and one without; a broken prompt splits some trajectories.

    A log-prob of its own tells each sampled token apart.
    """
    rng, made, token = np.random.default_rng(seed), [], 0
    for g in range(3):
        group = []
        for _ in range(rng.integers(2, 5)):
            seen: list[int] = []
            choices = []
            for _ in range(rng.integers(1, 5)):
                seen = seen if rng.random() < 0.7 else []
                prompt = [*seen, *rng.integers(6, 99, rng.integers(1, 4)).tolist()]
                sampled = rng.integers(6, 99, rng.integers(1, 6)).tolist()
                logprobs = [-(token + k + 1) / 256 for k in range(len(sampled))]
                choices.append(choice(sampled, prompt, logprobs))
                token, seen = token + len(sampled), prompt + sampled
            one = trajectory(float(rng.integers(0, 3)), *choices)
            one.turn_rewards = rng.integers(-1, 3, len(choices)).tolist() if g else None
            group.append(one)
        made.append(TrajectoryGroup(group))
    return made


def standardised(values: list[float]) -> list[float]:
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    return [(v - mean) / spread if spread > 1e-12 else 0.0 for v in values]


def turn_advantages_by_hand(groups: list[TrajectoryGroup]) -> list[list[float]]:
    """A_ik of each turn of each trajectory, from the definition in docs/objective.md."""
    out = []
    for group in groups:
        outcomes = standardised([t.reward for t in group])
        own = [t.turn_rewards or [0.0] * len(t.choices()) for t in group]
        returns = [
            [math.fsum(0.9 ** (j - k) * r[j] for j in range(k, len(r))) for k in range(len(r))]
            for r in own
        ]
        for i, of_one in enumerate(returns):
            turns = []
            for k, _ in enumerate(of_one):
                there = [n for n, r in enumerate(returns) if len(r) > k]
                compared = standardised([returns[n][k] for n in there])
                turns.append(outcomes[i] + 0.7 * compared[there.index(i)])
            out.append(turns)
    return out


def by_hand(groups: list[TrajectoryGroup], noise: np.ndarray, unit: str):
    """Loss and gradient of equation 14 with A by turn; groups without any advantage left out."""
    advantages = iter(turn_advantages_by_hand(groups))
    sequences: list[list[tuple[int, float]]] = []  # of each, its tokens and their advantages
    for group in groups:
        own = [next(advantages) for _ in group]
        if not any(any(turns) for turns in own):
            continue
        for one, turns in zip(group, own, strict=True):
            choices = zip(one.choices(), turns, strict=True)
            tokens = [
                [(round(-256 * p) - 1, a) for p in (c.model_extra or {})["token_logprobs"]]
                for c, a in choices
            ]
            sequences += tokens if unit == "turn" else [list(itertools.chain(*tokens))]
    loss, gradient, n = 0.0, np.zeros(len(noise)), len(sequences)
    for tokens in sequences:
        s = math.exp(math.fsum(noise[t] for t, _ in tokens) / len(tokens))
        pushes = []
        for _, a in tokens:
            free, bound = s * a, min(max(s, 1 - 0.05), 1 + 0.05) * a
            loss -= min(free, bound) / len(tokens) / n
            pushes.append(free if free <= bound else 0.0)
        for (t, _), push in zip(tokens, pushes, strict=True):
            gradient[t] = -push / len(tokens) / n
    return loss, gradient


def packed(groups, settings, noise: np.ndarray, budget: int):
    """Loss and gradient by token as training computes them, over all microbatches."""
    batch = prepare(groups, settings, context=10**4)
    batch = batch if settings.preset.counts_flat else batch.with_signal()
    loss, gradient, unit = 0.0, np.zeros(len(noise)), settings.sequence_unit
    for microbatch in pack(flat(batch.samples), budget, unit, share=budget % 2 == 0):
        key = np.rint(-256 * microbatch.old_logprobs.numpy()).astype(int) - 1
        old = microbatch.old_logprobs.double()
        new = (old + torch.tensor(noise[key])).requires_grad_()
        of_tokens = microbatch.token_advantages
        out = policy_loss(
            new,
            old,
            microbatch.sequence_ids,
            microbatch.advantages if of_tokens is None else None,
            settings.objective,
            token_advantages=of_tokens,
            total_sequences=sum(unit_count(s, unit) for s in batch.samples),
        )
        out.loss.backward()
        assert new.grad is not None
        loss, gradient[key] = loss + out.loss.item(), new.grad.numpy()
    return loss, gradient


def noise_for(groups: list[TrajectoryGroup], seed: int) -> np.ndarray:
    choices = (c for group in groups for t in group for c in t.choices())
    count = sum(len((c.model_extra or {})["token_ids"]) for c in choices)
    return np.random.default_rng(seed).normal(scale=0.15, size=count)


@pytest.mark.parametrize("unit", ["trajectory", "turn"])
@settings_of_hypothesis(max_examples=30, deadline=None)
@given(budget=st.integers(1, 200), seed=st.integers(0, 2**16))
def test_equation_14_with_an_advantage_for_each_turn_equals_the_loop(
    unit: Literal["trajectory", "turn"], budget: int, seed: int
):
    groups = conversations(seed)
    noise = noise_for(groups, seed)
    settings = resolve(options=SAMPO.model_copy(update={"sequence_unit": unit}))
    loss, gradient = packed(groups, settings, noise, budget)
    expected = by_hand(groups, noise, unit)
    assert loss == pytest.approx(expected[0], rel=1e-6, abs=1e-7)
    assert gradient == pytest.approx(expected[1], rel=1e-6, abs=1e-9)  # A is float32


@pytest.mark.parametrize("unit", ["trajectory", "turn"])
@settings_of_hypothesis(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_turns_that_all_earn_the_same_leave_gspo(unit: Literal["trajectory", "turn"], seed: int):
    groups = conversations(seed)
    noise = noise_for(groups, seed)
    plain = TrainConfig(algorithm="gspo", epsilon=0.05, sequence_unit=unit)
    expected = packed(groups, resolve(options=plain), noise, 64)
    for one in itertools.chain(*groups[1:]):
        one.turn_rewards = [0.0] * len(one.choices())
    token = TrainConfig(algorithm="gspo_token", epsilon=0.05, sequence_unit=unit)
    loss, gradient = packed(groups, resolve(options=token), noise, 64)
    assert loss == pytest.approx(expected[0], rel=1e-12)
    assert gradient == pytest.approx(expected[1], rel=1e-12)


def two_turns(reward: float, rewards: list[float] | None):
    one = trajectory(reward, choice([4], [1]), choice([5], [1, 4, 7]))
    one.turn_rewards = rewards
    return one


def test_a_trajectory_has_a_signal_if_any_of_its_turns_has_one():
    group = TrajectoryGroup([two_turns(1.0, [1.0, 0.0]), two_turns(1.0, [0.0, 0.0])])
    settings = resolve(options=TrainConfig(algorithm="sampo", turn_discount=1.0))
    batch = prepare([group], settings, context=99)
    assert [s[0].turn_advantages for s in batch.samples] == [(1, 0), (-1, 0)]
    assert [s[0].advantage for s in batch.samples] == [0, 0]
    assert (batch.flat_groups, batch.unread) == (0, False)
    assert with_gradient(batch.samples, settings.objective) == list(batch.samples)
    (microbatch,) = pack(flat(batch.samples), 99)
    assert microbatch.with_advantage.tolist() == [True, True]
    assert microbatch.advantages.tolist() == [0.5, -0.5]
    assert microbatch.token_advantages is not None
    assert microbatch.token_advantages.tolist() == [1, 0, -1, 0]


def test_turn_rewards_that_the_method_does_not_read_change_nothing_and_are_told(caplog):
    summed = TrajectoryGroup([two_turns(1.0, [1.0, 0.0]), two_turns(0.0, [0.0, 0.0])])
    assert not prepare([summed], context=99).unread  # they are in the rewards
    group = TrajectoryGroup([two_turns(1.0, [0.5, 0.0]), two_turns(0.0, [0.0, 0.0])])
    batch, warned = prepare([group], context=99), set()
    assert batch.unread
    assert [s[0].turn_advantages for s in batch.samples] == [(), ()]
    for _ in range(2):
        warn_of_unread(batch, resolve(), warned)
    assert [record.message[:40] for record in caplog.records] == [
        "the trajectories have turn_rewards, whic"
    ]


def test_turn_rewards_of_a_part_of_a_group_are_refused():
    group = TrajectoryGroup([two_turns(1.0, None), two_turns(1.0, [0.0, 1.0])])
    with pytest.raises(DataError, match="group 1: trajectory 1 has turn_rewards, trajectory 0 has"):
        prepare([*groups((0, 1)), group], context=99)
