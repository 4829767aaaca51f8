"""pi_old of the trainer, against a plain forward pass of each sample by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gspo import TrajectoryGroup, dev
from gspo.data.packing import pack
from gspo.data.sample import Sample
from gspo.policy.policy import Policy
from gspo.train.minibatches import RolloutBatch, prepare
from gspo.train.old_logprobs import with_trainer_logprobs
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer
from policy.routers import moe
from support import choice, embedded, random_groups, trajectory
from train.test_expert_replay import routed


def several_samples(size: int = 3) -> RolloutBatch:
    """Trajectories of one to three samples: prompts that don't extend what came before."""
    rng = np.random.default_rng(0)

    def tokens(low: int, high: int) -> list[int]:
        return rng.integers(20, 60, rng.integers(low, high)).tolist()

    groups = []
    for group in range(3):
        members = []
        for i in range(size):
            turns = [choice(tokens(1, 9), tokens(2, 12)) for _ in range((group + i) % 3 + 1)]
            members.append(trajectory(float(i), *turns))
        groups.append(TrajectoryGroup(members))
    batch = prepare(groups, context=512)
    assert {len(samples) for samples in batch.samples} == {1, 2, 3}
    return batch


def plain(policy: Policy, sample: Sample) -> np.ndarray:
    """log pi of the sampled tokens; 0 elsewhere."""
    with torch.no_grad():
        logits = policy.lm(input_ids=torch.from_numpy(sample.tokens)[None]).logits[0].double()
    out = np.zeros(len(sample))
    for t in np.flatnonzero(sample.ratio_mask):
        out[t] = logits[t - 1].log_softmax(-1)[sample.tokens[t]].item()
    return out


def scored(policy: Policy, batch: RolloutBatch, budget: int, **given: Any) -> list[Sample]:
    options = dev.TrainConfig(**{"share_prefixes": False, "packed_sequence_length": budget} | given)
    found = with_trainer_logprobs(policy, batch.samples, resolve(options=options))
    assert [own[0].trajectory_id for own in found] == [s[0].trajectory_id for s in batch.samples]
    return [sample for samples in found for sample in samples]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_every_sample_of_a_trajectory_has_its_own(budget: int, share: bool):
    policy, batch = embedded(), several_samples()
    before = [sample for samples in batch.samples for sample in samples]
    for sample, given in zip(
        scored(policy, batch, budget, share_prefixes=share), before, strict=True
    ):
        np.testing.assert_allclose(sample.old_logprobs, plain(policy, given), atol=1e-5)
        assert (sample.tokens == given.tokens).all()
        assert (sample.sampling_logprobs == given.sampling_logprobs).all()
        assert (given.old_logprobs == given.sampling_logprobs).all()  # the batch is as it was


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_replayed_experts_are_those_of_the_samples(budget: int):
    policy = moe()
    batch = routed(policy, prepare(random_groups(policy), context=policy.context), shift=1)
    given = [sample for samples in batch.samples for sample in samples]
    replayed = scored(policy, batch, budget, routing_replay="rollout")
    free = scored(policy, batch, budget)
    for sample, own, other in zip(given, replayed, free, strict=True):
        (microbatch,) = pack([sample], 10_000)
        with torch.no_grad(), policy.routers.watch(microbatch.expert_choices):
            expected = policy.logprobs(microbatch).logprobs.numpy()
        np.testing.assert_allclose(own.old_logprobs[sample.ratio_mask], expected, atol=1e-5)
        np.testing.assert_allclose(other.old_logprobs, plain(policy, sample), atol=1e-5)
    pairs = zip(replayed, free, strict=True)
    assert max(np.abs(a.old_logprobs - b.old_logprobs).max() for a, b in pairs) > 0.01


def first_step(policy: Policy, batch: RolloutBatch, **options: Any) -> dict[str, float]:
    settings = resolve(options=dev.TrainConfig(minibatches=1, old_logprobs="trainer", **options))
    return Trainer(policy).train(batch, settings).metrics.compute()


@pytest.mark.parametrize("unit", ["trajectory", "turn"])
def test_no_ratio_moves_before_the_first_update(unit: str):
    """Whatever the engine said: its log-probs are -1 for every token here."""
    metrics = first_step(embedded(), several_samples(), sequence_unit=unit)
    assert metrics["ratio/log_abs_max"] < 1e-5
    assert metrics["ratio/token_log_square"] < 1e-10
    assert metrics["mismatch/log_ratio_abs_max"] > 0.1


@pytest.mark.parametrize("replay", ["none", "old_policy", "rollout"])
def test_no_ratio_moves_before_the_first_update_with_replay(replay: str):
    """The step and its pi_old go through the same experts: the engine's if those are replayed."""
    policy = moe()
    batch = routed(policy, prepare(random_groups(policy), context=policy.context), shift=1)
    metrics = first_step(policy, batch, routing_replay=replay)
    assert metrics["ratio/token_log_square"] < 1e-10
    assert metrics["moe/routing_agreement"] < 0.9
