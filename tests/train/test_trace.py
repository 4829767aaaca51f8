"""Traces: the d_t and l_i of every trained trajectory, against the model's own forward."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gspo import TrainConfig, TrajectoryGroup, dev
from gspo.data.sample import Sample
from gspo.policy.policy import Policy
from gspo.train.minibatches import RolloutBatch, prepare
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer, TrainOutput
from support import choice, embedded, random_groups, trajectory


def naive(policy: Policy, samples: tuple[Sample, ...]) -> list[float]:
    """d_t of a trajectory, one sample after the other, in float64."""
    d: list[float] = []
    with torch.no_grad():
        for sample in samples:
            tokens = torch.from_numpy(sample.tokens)
            logp = policy.lm(input_ids=tokens[None]).logits[0].double().log_softmax(-1)
            for t in np.flatnonzero(sample.ratio_mask):
                d.append(logp[t - 1, tokens[t]].item() - float(sample.old_logprobs[t]))
    return d


def trained(policy: Policy, batch: RolloutBatch, **options) -> TrainOutput:
    return Trainer(policy).train(batch, resolve(options=dev.TrainConfig(**options)))


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_traces_equal_the_naive_loop_however_they_are_packed(budget: int):
    policy = embedded()
    batch = prepare(random_groups(policy), context=512)
    expected = {own[0].trajectory_id: naive(policy, own) for own in batch.samples}
    rate = TrainConfig(learning_rate=1e-12)
    options = dev.TrainConfig(
        minibatches=1, packed_sequence_length=budget, epsilon=0.3, epsilon_high=0.5
    )
    out = Trainer(policy).train(batch, resolve(rate, options))
    assert set(out.traces) == set(expected)
    for number, (trace,) in out.traces.items():
        d = expected[number]
        assert trace.token_log_ratios.dtype == np.float32
        np.testing.assert_allclose(trace.token_log_ratios, d, atol=1e-5)
        assert trace.log_ratio == pytest.approx(math.fsum(d) / len(d), abs=1e-5)
        s, advantage = math.exp(trace.log_ratio), trace.advantage
        clipped = s > 1.5 if advantage > 0 else s < 0.7
        assert trace.clipped_tokens == (len(d) if clipped else 0)
        assert trace.trained_tokens == trace.length == len(d)
        assert advantage == pytest.approx(batch.samples[number][0].advantage)
    clipped = [trace.clipped_tokens > 0 for (trace,) in out.traces.values()]
    assert True in clipped and False in clipped


def test_what_was_not_trained_on_has_no_trace():
    policy = embedded()
    groups = random_groups(policy, groups=2)
    for own in groups[0]:
        own.reward = 1.0
    out = trained(policy, prepare(groups, context=512), minibatches=1)
    assert sorted(out.traces) == [4, 5, 6, 7]


def test_of_several_epochs_the_last_update_is_kept():
    policy = embedded()
    batch = prepare(random_groups(policy, groups=4), context=512)
    out = trained(policy, batch, minibatches=2, epochs=3)
    assert out.updates == 6
    assert {trace.update for own in out.traces.values() for trace in own} == {4, 5}
    assert all(len(own) == 1 for own in out.traces.values())
    assert len(out.traces) == 16


@pytest.mark.parametrize("unit", ["trajectory", "turn"])
def test_broken_prefixes_and_turns_keep_the_order_of_sampling(unit: str):
    policy = embedded()
    first, second = choice([20, 21], [9, 8]), choice([30, 31, 32], [7, 7, 7])
    third = choice([33], [7, 7, 7, 30, 31, 32, 10])  # goes on where the second one ended
    broken = trajectory(1.0, first, second, third)
    plain = trajectory(0.0, choice([25, 26], [9, 8]))
    batch = prepare([TrajectoryGroup([plain, broken])], context=512)
    assert [len(own) for own in batch.samples] == [1, 2]
    expected = naive(policy, batch.samples[1])
    out = trained(policy, batch, minibatches=1, sequence_unit=unit)
    found = out.traces[1]
    assert [int(trace.length) for trace in found] == ([2, 3, 1] if unit == "turn" else [6])
    d = np.concatenate([trace.token_log_ratios for trace in found])
    np.testing.assert_allclose(d, expected, atol=1e-5)
