"""What is seen of a step: metrics that no packing of its samples changes, and traces."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.test_packing import make_sample
from gspo import TrainConfig, TrajectoryGroup, dev
from gspo.data.packing import Microbatch, pack
from gspo.data.sample import Sample
from gspo.kernels.logprob import TokenLogprobs
from gspo.objective import Level, Objective, policy_loss
from gspo.policy.load import Policy
from gspo.policy.workers import Workers
from gspo.train.backward import backward_each
from gspo.train.minibatches import RolloutBatch, prepare
from gspo.train.observe import Observer, Scored
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer, TrainOutput
from support import choice, embedded, random_groups, trajectory

TRAJECTORIES = 12
TOTAL = 16
EPSILON = 0.05
BUDGETS = [1, 40, 90, 10_000]


class Table:
    """A policy whose log-probs are a table, by the token's (unique) number."""

    packing = "tiles"
    version = 0
    lm = torch.nn.Module()

    def __init__(self, samples: list[Sample]):
        tokens = np.concatenate([sample.tokens for sample in samples])
        old = np.concatenate([sample.old_logprobs for sample in samples])
        rng = np.random.default_rng(1)
        self.row = {int(token): i for i, token in enumerate(tokens)}
        size = np.abs(rng.normal(size=len(old))) * 0.2
        shift = [(sample.trajectory_id % 5 - 2) * 0.1 for sample in samples for _ in sample.tokens]
        self.weight = torch.tensor(old - size + np.array(shift), dtype=torch.float32)
        self.weight[0] = 900.0  # not sampled: a prompt's first token
        self.weight.requires_grad_()

    @property
    def trainable(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def forward(self, batch: Microbatch) -> TokenLogprobs:
        tokens = batch.tokens[0, batch.targets].tolist()
        logprobs = self.weight[torch.tensor([self.row[token] for token in tokens])]
        return TokenLogprobs(logprobs=logprobs, entropy=-logprobs.detach())


def samples_of_a_step() -> list[Sample]:
    """Three samples a trajectory, of very different lengths."""
    rng = np.random.default_rng(0)
    out = []
    for owner in range(TRAJECTORIES):
        for _ in range(3):
            sample = make_sample(owner, int(rng.integers(2, 4 + 3 * owner)), rng)
            advantage = float(np.round(np.sin(owner), 2)) if owner != 5 else 0.0
            out.append(dataclasses.replace(sample, advantage=advantage))
    return out


def reference(microbatch: Microbatch) -> Tensor:
    """Log-probs under a reference, by the token's number alone."""
    numbers = microbatch.tokens[0, microbatch.targets]
    return microbatch.old_logprobs - 0.3 + 0.1 * (numbers % 7)


def of_a_step(
    samples: list[Sample], objective: Objective, budget: int
) -> tuple[Tensor, dict[str, float]]:
    """Gradient and metrics of one optimizer step of TOTAL sequences."""
    table: Any = Table(samples_of_a_step())
    watch = Observer(table, RolloutBatch((), (), 0))
    tokens = sum(sample.sampled for sample in samples)

    def loss_of(microbatch: Microbatch) -> tuple[Tensor, Scored]:
        scored = table.forward(microbatch)
        out = policy_loss(
            scored.logprobs,
            microbatch.old_logprobs,
            microbatch.sequence_ids,
            microbatch.advantages,
            objective,
            total_sequences=TOTAL,
            total_tokens=tokens,
            reference_logprobs=reference(microbatch) if objective.kl_coef else None,
        )
        loss = out.loss
        out = replace(out, loss=out.loss.detach())
        return loss, Scored(microbatch, scored.logprobs.detach(), scored.entropy, out)

    step = list(backward_each(table, pack(samples, budget), loss_of, Workers()))
    watch.record(step, objective, on_policy=False)
    metrics = watch.metrics.compute()
    del metrics["tokens/packed_efficiency"]  # the one that describes the packing
    return table.weight.grad, {n: v for n, v in metrics.items() if not n.startswith("train/")}


def assert_same_step(objective: Objective, budget: int) -> dict[str, float]:
    samples = samples_of_a_step()
    gradient, metrics = of_a_step(samples, objective, budget=10_000)
    order = np.random.default_rng(budget).permutation(len(samples))
    other, other_metrics = of_a_step([samples[i] for i in order], objective, budget)
    torch.testing.assert_close(other, gradient, rtol=1e-5, atol=1e-9)
    assert other_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-7)
    return metrics


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token", "geometric_average"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_any_budget_and_order_is_the_same_step(level: Level, budget: int) -> None:
    assert_same_step(Objective(level, EPSILON, EPSILON), budget)


@pytest.mark.parametrize("aggregate", ["sequence_mean", "sequence_sum", "token_mean"])
@pytest.mark.parametrize("budget", BUDGETS[:3])
def test_the_kl_term_is_the_same_in_any_budget_and_is_the_loops(
    aggregate: Any, budget: int
) -> None:
    objective = Objective("token", EPSILON, EPSILON, kl_coef=0.5, aggregate=aggregate)
    metrics = assert_same_step(objective, budget)
    samples = samples_of_a_step()
    weight = Table(samples).weight.detach().double().numpy()
    row, expected = 0, 0.0
    length = {o: sum(s.sampled for s in samples if s.trajectory_id == o) for o in range(12)}
    total = sum(s.sampled for s in samples) if aggregate == "token_mean" else TOTAL
    for sample in samples:
        for t in range(len(sample)):
            if sample.ratio_mask[t]:
                q = float(sample.old_logprobs[t]) - 0.3 + 0.1 * (int(sample.tokens[t]) % 7)
                q -= weight[row + t]
                mean = length[sample.trajectory_id] if aggregate == "sequence_mean" else 1
                expected += (np.exp(q) - q - 1) / mean / total
        row += len(sample)
    assert metrics["loss/kl"] == pytest.approx(expected, rel=1e-5)


def test_a_kl_term_changes_no_ratio_metric() -> None:
    """Flat groups then have a forward pass; what is clipped is still a share of the others."""
    samples = samples_of_a_step()
    signal = [sample for sample in samples if sample.advantage != 0]
    assert 0 < len(signal) < len(samples)
    objective = Objective("sequence", EPSILON, EPSILON)
    _, without = of_a_step(signal, objective, budget=60)
    _, with_kl = of_a_step(samples, replace(objective, kl_coef=0.1), budget=60)
    ratios = {name: value for name, value in with_kl.items() if name.startswith("ratio/")}
    assert len(ratios) == 12
    assert ratios == pytest.approx({name: without[name] for name in ratios})
    assert with_kl["tokens/trained"] > without["tokens/trained"]  # the KL term trains on them


def test_the_metrics_are_what_they_say() -> None:
    """Level `sequence`: a loop over trajectories."""
    samples = samples_of_a_step()
    weight = Table(samples).weight.detach().double().numpy()
    objective = Objective("sequence", EPSILON, EPSILON)
    _, metrics = of_a_step(samples, objective, budget=40)
    log_ratios, clipped, advantages, policy = [], [], [], 0.0
    masks = np.concatenate([sample.ratio_mask for sample in samples])
    old = np.concatenate([sample.old_logprobs for sample in samples]).astype(float)
    owners = np.concatenate([np.full(len(sample), sample.trajectory_id) for sample in samples])
    for owner in range(TRAJECTORIES):
        own = masks & (owners == owner)
        advantage = next(s.advantage for s in samples if s.trajectory_id == owner)
        log_ratio = (weight - old)[own].mean()
        s = np.exp(log_ratio)
        free, bound = s * advantage, np.clip(s, 1 - EPSILON, 1 + EPSILON) * advantage
        policy -= min(free, bound) / TOTAL
        log_ratios.append(log_ratio)
        clipped.append(bound < free)
        advantages.append(advantage)
    hit, sign, log_ratios = np.array(clipped), np.sign(advantages), np.array(log_ratios)
    tokens = np.array([(masks & (owners == owner)).sum() for owner in range(TRAJECTORIES)])
    counted = sign != 0
    log_ratios = log_ratios[counted]  # of sequences with an advantage
    signal = masks & counted[owners]
    assert hit.any()
    assert not hit[counted].all()
    assert not counted.all()
    expected = {
        "loss/policy": policy,
        "loss/kl": 0.0,
        "ratio/clip_fraction": hit[counted].mean(),
        "ratio/clip_fraction_positive": hit[sign > 0].mean(),
        "ratio/clip_fraction_negative": hit[sign < 0].mean(),
        "ratio/clip_fraction_tokens": np.dot(hit, tokens) / sum(tokens[counted]),
        "ratio/extreme": 0,
        "ratio/log_mean": np.mean(log_ratios),
        "ratio/log_abs_max": np.abs(log_ratios).max(),
        "ratio/log_p01": np.quantile(log_ratios, 0.01),
        "ratio/log_p50": np.quantile(log_ratios, 0.5),
        "ratio/log_p99": np.quantile(log_ratios, 0.99),
        "ratio/log_square": np.square(log_ratios).mean(),
        "ratio/token_log_square": np.square((weight - old)[signal]).mean(),
        "loss/entropy": -weight[masks].mean(),
        "tokens/trained": sum(tokens),
        "tokens/computed": len(masks),
        "tokens/shared_saving": 0.0,
    }
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-7)


# Traces, against the model's own forward


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
