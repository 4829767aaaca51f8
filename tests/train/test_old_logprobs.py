"""pi_old of the trainer, against a plain forward pass of each sample by itself."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from gspo import TrajectoryGroup, dev
from gspo.data.packing import pack
from gspo.data.sample import Sample
from gspo.policy.policy import Policy
from gspo.serve.engine import Request, SamplingParams
from gspo.serve.torch_engine import TorchEngine
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


# Sequences whose tokens were sampled by several versions of the weights


def spanning(policy: Policy, changes: dict[int, float], length: int = 12) -> TrajectoryGroup:
    """Two sampled trajectories; before some steps the weights are scaled and published."""
    engine = TorchEngine(policy)
    params = SamplingParams(n=2, max_tokens=length, seed=5, ignore_eos=True)
    done = engine.opened(Request((6, 7, 8), params))
    batch = engine.batch()
    with engine.computing():
        for step in range(length):
            if step in changes:
                scale_weights(policy, changes[step])
            batch.step(done if step == 0 else [])
    choices = [
        choice(
            one.tokens, (6, 7, 8), one.logprobs, policy_version=one.versions[0],
            policy_versions=list(one.versions),
        )
        for one in done
    ]  # fmt: skip
    return TrajectoryGroup([trajectory(float(i), one) for i, one in enumerate(choices)])


def scale_weights(policy: Policy, factor: float) -> None:
    policy.version += 1
    with torch.no_grad():
        for weight in policy.trainable.values():
            weight.mul_(factor)


def token_by_token(policy: Policy, tokens: list[int], changes: dict[int, float]) -> list[float]:
    """Log-probs of tokens 3, 4, ... by a plain loop in float64, over the model's own cache: what a
    token saw of those before it was computed by the weights of that time."""
    lm = copy.deepcopy(policy.lm).double()
    lm.set_attn_implementation("eager")
    lm.set_experts_implementation("eager")
    cache, out, fed = None, [], tokens[:3]
    with torch.no_grad():
        for step, token in enumerate(tokens[3:]):
            if step in changes:
                for weight in lm.parameters():
                    weight.mul_(changes[step])
            seen = lm(input_ids=torch.tensor([fed]), past_key_values=cache, use_cache=True)
            cache, fed = seen.past_key_values, [token]
            out.append(seen.logits[0, -1].double().log_softmax(-1)[token].item())
    return out


@pytest.mark.parametrize("changes", [{5: 1.05}, {3: 1.04, 8: 0.97}])
def test_of_several_versions_each_token_has_its_own_old_log_prob(changes: dict[int, float]):
    """s_i = exp of the mean of log pi_theta(y_t) - (what y_t was recorded with when sampled)."""
    policy, before = embedded(), embedded()
    group = spanning(policy, changes)
    batch = prepare([group], context=512)
    for (sample,) in batch.samples:
        assert len(np.unique(sample.policy_versions[3:])) == 1 + len(changes)
        recorded = token_by_token(before, sample.tokens.tolist(), changes)
        np.testing.assert_allclose(sample.old_logprobs[3:], recorded, atol=2e-5)
    expected = []
    for (sample,) in batch.samples:  # before training moves the weights
        d = [plain(policy, sample)[t] - float(sample.old_logprobs[t]) for t in range(3, 15)]
        expected.append(sum(d) / len(d))
    assert min(map(abs, expected)) > 1e-3  # or it would show nothing
    out = Trainer(policy).train(batch, resolve(options=dev.TrainConfig(minibatches=1)))
    for number, log_ratio in enumerate(expected):
        (trace,) = out.traces[number]
        assert trace.log_ratio == pytest.approx(log_ratio, abs=2e-6)
    metrics = out.metrics.compute()
    assert metrics["staleness/mixed_share"] == 1
    assert metrics["staleness/max"] == len(changes)
    assert "mismatch/log_ratio_mean" not in metrics  # which would count the weights' own change
