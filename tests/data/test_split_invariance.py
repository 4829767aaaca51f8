"""Loss, gradient and reduced metrics of a step are the same for every packing of its samples."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.test_packing import make_sample
from gspo.core.metrics import Metrics
from gspo.data.packing import Microbatch
from gspo.data.sample import Sample
from gspo.kernels.logprob import TokenLogprobs
from gspo.objective import Level, Objective
from gspo.policy.workers import Workers
from gspo.train import step

TRAJECTORIES = 12
TOTAL = 16
EPSILON = 0.05
BUDGETS = [1, 40, 90, 10_000]


class Table:
    """A policy whose log-probs are a table, by the token's (unique) number."""

    packing = "buckets"
    workers = Workers()

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

    def forward(self, _policy: Any, microbatch: Microbatch, _chunk: int | None) -> TokenLogprobs:
        tokens = microbatch.tokens[0, microbatch.targets].tolist()
        logprobs = self.weight[torch.tensor([self.row[token] for token in tokens])]
        return TokenLogprobs(logprobs=logprobs, entropy=-logprobs.detach())


def samples_of_a_step() -> list[Sample]:
    """Three samples a trajectory, of very different lengths; one trajectory has no loss."""
    rng = np.random.default_rng(0)
    out = []
    for owner in range(TRAJECTORIES):
        for _ in range(3):
            sample = make_sample(owner, int(rng.integers(2, 4 + 3 * owner)), rng)
            if owner == 3:
                sample.loss_mask[:] = False
            advantage = float(np.round(np.sin(owner), 2)) if owner != 5 else 0.0
            out.append(dataclasses.replace(sample, advantage=advantage))
    return out


def reference(microbatch: Microbatch) -> Tensor:
    """Log-probs under a reference, by the token's number alone."""
    numbers = microbatch.tokens[0, microbatch.targets]
    return microbatch.old_logprobs - 0.3 + 0.1 * (numbers % 7)


def of_a_step(
    monkeypatch: pytest.MonkeyPatch, samples: list[Sample], objective: Objective, budget: int
) -> tuple[Tensor, dict[str, float]]:
    table, metrics = Table(samples_of_a_step()), Metrics()
    monkeypatch.setattr(step, "forward", table.forward)
    tokens = sum(int(sample.loss_mask.sum()) for sample in samples)
    work = step.StepInput(samples, TOTAL, tokens, budget, chunk=None)
    policy: Any = table
    known = reference if objective.kl_coef else None
    step.accumulate(policy, work, objective, metrics, known)
    assert table.weight.grad is not None
    found = metrics.compute()
    del found["tokens/packed_efficiency"]  # the one that describes the packing
    return table.weight.grad, found


def assert_same_step(
    monkeypatch: pytest.MonkeyPatch, objective: Objective, budget: int
) -> dict[str, float]:
    samples = samples_of_a_step()
    gradient, metrics = of_a_step(monkeypatch, samples, objective, budget=10_000)
    order = np.random.default_rng(budget).permutation(len(samples))
    other, other_metrics = of_a_step(monkeypatch, [samples[i] for i in order], objective, budget)
    torch.testing.assert_close(other, gradient, rtol=1e-5, atol=1e-9)
    assert other_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-7)
    return metrics


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token", "geometric_average"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_any_budget_and_order_is_the_same_step(
    monkeypatch: pytest.MonkeyPatch, level: Level, budget: int
) -> None:
    assert_same_step(monkeypatch, Objective(level, EPSILON, EPSILON), budget)


@pytest.mark.parametrize("aggregate", ["sequence_mean", "sequence_sum", "token_mean"])
@pytest.mark.parametrize("budget", BUDGETS[:3])
def test_the_kl_term_is_the_same_in_any_budget_and_is_the_loops(
    monkeypatch: pytest.MonkeyPatch, aggregate: Any, budget: int
) -> None:
    objective = Objective("token", EPSILON, EPSILON, kl_coef=0.5, aggregate=aggregate)
    metrics = assert_same_step(monkeypatch, objective, budget)
    samples = samples_of_a_step()
    weight = Table(samples).weight.detach().double().numpy()
    row, expected = 0, 0.0
    length = {o: sum(s.sampled for s in samples if s.trajectory_id == o) for o in range(12)}
    total = sum(int(s.loss_mask.sum()) for s in samples) if aggregate == "token_mean" else TOTAL
    for sample in samples:
        for t in range(len(sample)):
            if sample.loss_mask[t]:
                q = float(sample.old_logprobs[t]) - 0.3 + 0.1 * (int(sample.tokens[t]) % 7)
                q -= weight[row + t]
                mean = length[sample.trajectory_id] if aggregate == "sequence_mean" else 1
                expected += (np.exp(q) - q - 1) / mean / total
        row += len(sample)
    assert metrics["loss/kl"] == pytest.approx(expected, rel=1e-5)


def test_a_kl_term_changes_no_ratio_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat groups then have a forward pass; what is clipped is still a share of the others."""
    samples = samples_of_a_step()
    signal = [sample for sample in samples if sample.advantage != 0]
    assert 0 < len(signal) < len(samples)
    objective = Objective("sequence", EPSILON, EPSILON)
    _, without = of_a_step(monkeypatch, signal, objective, budget=60)
    _, with_kl = of_a_step(monkeypatch, samples, replace(objective, kl_coef=0.1), budget=60)
    ratios = {name: value for name, value in with_kl.items() if name.startswith("ratio/")}
    assert len(ratios) == 12
    assert ratios == pytest.approx({name: without[name] for name in ratios})
    assert with_kl["tokens/trained"] > without["tokens/trained"]  # the KL term trains on them


def test_the_metrics_are_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Level `sequence`: a loop over trajectories."""
    samples = samples_of_a_step()
    weight = Table(samples).weight.detach().double().numpy()
    objective = Objective("sequence", EPSILON, EPSILON)
    _, metrics = of_a_step(monkeypatch, samples, objective, budget=40)
    log_ratios, clipped, advantages, policy = [], [], [], 0.0
    masks = np.concatenate([sample.ratio_mask for sample in samples])
    trained = np.concatenate([sample.loss_mask for sample in samples])
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
        clipped.append(bound < free and owner != 3)
        advantages.append(advantage)
    hit, sign, log_ratios = np.array(clipped), np.sign(advantages), np.array(log_ratios)
    tokens = np.array([(trained & (owners == owner)).sum() for owner in range(TRAJECTORIES)])
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
        "loss/entropy": -weight[trained].mean(),
        "tokens/trained": sum(tokens),
        "tokens/computed": len(masks),
        "tokens/shared_saving": 0.0,
    }
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-7)
