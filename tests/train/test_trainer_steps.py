"""Which optimizer steps a call of `train` takes: in which order, at which rate, how far."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from gspo import TrajectoryGroup, dev
from gspo.config import TrainConfig
from gspo.core.errors import NumericsError
from gspo.data.sample import Sample
from gspo.objective import Objective
from gspo.policy.load import Policy, load_policy
from gspo.policy.workers import Workers
from gspo.train import trainer as trainer_module
from gspo.train.epsilon import needed_epsilon
from gspo.train.minibatches import RolloutBatch, prepare
from gspo.train.observe import Observer
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer
from support import choice, embedded, random_groups, trajectory

RATE = 1e-3


def batch_of(policy: Policy, flat: tuple[int, ...] = (), **extra: Any) -> RolloutBatch:
    """Random groups, some of them with equal rewards."""
    groups = random_groups(policy, **({"groups": 4} | extra))
    for number in flat:
        for t in groups[number]:
            t.reward = 0.5
    return prepare(groups, context=policy.context)


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.trainable.items()}


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rate of each optimizer step, which is not taken."""
    seen: list[float] = []

    def step(self: Any, rate: float, options: Any) -> float:
        seen.append(rate)
        self.clear()
        return 1.0

    monkeypatch.setattr(trainer_module.Optimizer, "step", step)
    return seen


@dataclasses.dataclass
class Step:
    """What an optimizer step, which is not taken, was computed from."""

    samples: list[Sample]
    unit: str
    total_sequences: int = 0
    total_tokens: int = 0


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The optimizer steps of a call; only the first microbatch of each has a forward pass."""
    seen: list[Step] = []
    pack, loss = trainer_module.pack, trainer_module.policy_loss

    def packed(samples: list[Sample], budget: int, unit: str, **how: Any) -> Any:
        seen.append(Step(samples, unit))
        return pack(samples, budget, unit, **how)  # pyright: ignore[reportArgumentType]

    def policy_loss(*args: Any, **given: Any) -> Any:
        step = seen[-1]
        step.total_sequences, step.total_tokens = given["total_sequences"], given["total_tokens"]
        return loss(*args, **given)

    monkeypatch.setattr(trainer_module, "pack", packed)
    monkeypatch.setattr(trainer_module, "policy_loss", policy_loss)
    monkeypatch.setattr(trainer_module.Optimizer, "step", lambda self, *_: self.clear() or 1.0)
    return seen


def two_samples(reward: float) -> TrajectoryGroup:
    """A trajectory of three turns in two samples, 4 + 4 tokens of prompt and completion, and one
    of 1 + 5 tokens, whose reward is 1."""
    turns = [choice([24, 25], [1, 2]), choice([26], [1, 2, 24, 25, 3]), choice([27], [9])]
    return TrajectoryGroup([trajectory(reward, *turns), trajectory(1.0, choice([28] * 5, [9]))])


def order_of(steps: list[Step]) -> list[list[int]]:
    """The trajectories of each step."""
    return [[sample.trajectory_id for sample in step.samples] for step in steps]


def test_each_minibatch_of_a_warmup_has_its_own_rate(rates: list[float]):
    trainer = Trainer(embedded())
    batch = batch_of(trainer.policy)
    settings = resolve(TrainConfig(learning_rate=RATE), dev.TrainConfig(lr_warmup_steps=2))
    first = trainer.train(batch, settings).metrics.compute()
    for _ in range(2):
        trainer.train(batch, settings)
    expected = [RATE * (k + 1) / 8 for k in range(8)] + [RATE] * 4
    assert rates == pytest.approx(expected)
    assert first["optim/learning_rate"] == pytest.approx(sum(expected[:4]) / 4)


def test_a_decay_goes_on_inside_a_call_and_ends_after_the_last_update(rates: list[float]):
    trainer = Trainer(embedded())
    batch = batch_of(trainer.policy)
    options = dev.TrainConfig(lr_schedule="linear", lr_total_steps=2, minibatches=2, epochs=2)
    for _ in range(2):
        trainer.train(batch, resolve(TrainConfig(learning_rate=RATE), options))
    assert rates == pytest.approx([RATE * (8 - k) / 8 for k in range(8)])


def test_a_skipped_minibatch_keeps_its_place_in_the_schedule(rates: list[float]):
    trainer = Trainer(embedded())
    batch = batch_of(trainer.policy, flat=(0, 1, 3))
    settings = resolve(TrainConfig(learning_rate=RATE), dev.TrainConfig(lr_warmup_steps=1))
    out = trainer.train(batch, settings)
    assert (out.updates, out.metrics.compute()["optim/skipped"]) == (1, 3)
    assert len(rates) == 1
    assert rates[0] in [pytest.approx(RATE * (k + 1) / 4) for k in range(4)]


def test_two_epochs_and_two_calls_have_other_minibatches(steps: list[Step]):
    trainer = Trainer(embedded())
    batch = batch_of(trainer.policy, groups=8, size=2)
    settings = resolve(options=dev.TrainConfig(minibatches=4, epochs=2))
    for _ in range(2):
        trainer.train(batch, settings)
    order = order_of(steps)
    epochs = [order[i : i + 4] for i in range(0, 16, 4)]
    for epoch in epochs:
        assert sorted(t for part in epoch for t in part) == list(range(16))
    partitions = [{frozenset(part) for part in epoch} for epoch in epochs]
    assert len({frozenset(partition) for partition in partitions}) == 4


def test_the_seed_alone_decides_the_order(steps: list[Step]):
    batch = batch_of(embedded(), groups=8, size=2)
    for seed in (0, 0, 1):
        Trainer(embedded()).train(batch, resolve(options=dev.TrainConfig(seed=seed)))
    order = order_of(steps)
    assert order[:4] == order[4:8] != order[8:]


@pytest.mark.parametrize(("version", "first"), [(0, True), (1, False)])
def test_only_the_first_step_on_fresh_samples_measures_the_engine(
    monkeypatch: pytest.MonkeyPatch, version: int, first: bool
):
    """Later ones have moved weights, under the version that sampled until the call is over."""
    seen: list[bool] = []
    inner = Observer.backward_done

    def backward_done(self: Observer, objective: Objective, *, on_policy: bool) -> None:
        seen.append(on_policy)
        inner(self, objective, on_policy=on_policy)

    monkeypatch.setattr(Observer, "backward_done", backward_done)
    policy = embedded()
    policy.version = version  # the samples' is 0
    options = dev.TrainConfig(epochs=2)
    out = Trainer(policy).train(batch_of(policy), resolve(options=options))
    assert seen == [first, *[False] * 7]
    assert {trace.update for traces in out.traces.values() for trace in traces} == {4, 5, 6, 7}
    assert ("mismatch/log_ratio_mean" in out.metrics.compute()) == first


@pytest.mark.parametrize(("unit", "sequences"), [("trajectory", 4), ("turn", 8)])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_n_and_t_count_the_whole_step(steps: list[Step], unit: Any, sequences: int, kl_coef: float):
    """Flat groups too, with and without a forward pass; three turns, the last in another sample."""
    policy = embedded()
    trainer = Trainer(policy, lambda: load_policy("embedded:sort"))
    options = dev.TrainConfig(minibatches=1, sequence_unit=unit)
    settings = resolve(TrainConfig(kl_penalty_coef=kl_coef), options)
    trainer.train(prepare([two_samples(0.0), two_samples(1.0)], context=512), settings)
    (step,) = steps
    assert (step.total_sequences, step.total_tokens, step.unit) == (sequences, 18, unit)
    assert len(step.samples) == (6 if kl_coef else 3)


@pytest.mark.parametrize("limit", [1e-3, 1e6, None])
def test_max_grad_norm_bounds_how_far_the_weights_move(limit: float | None):
    """adam_epsilon is so large that AdamW's first step is the gradient times a constant."""
    policy = embedded()
    before = weights(policy)
    settings = resolve(options=dev.TrainConfig(minibatches=1, max_grad_norm=limit))
    # Past what options take: nothing would be learned with such an epsilon alone.
    settings = settings.model_copy(update={"adam_epsilon": 1e3, "learning_rate": 1e3})
    out = Trainer(policy).train(batch_of(policy), settings).metrics.compute()
    norm = out["optim/grad_norm"]
    assert norm > 0.01
    moved = math.sqrt(
        sum((p.double() - before[n].double()).square().sum() for n, p in weights(policy).items())
    )
    assert moved == pytest.approx(min(norm, limit or math.inf), rel=1e-3)


def test_staleness_counts_versions_since_a_token_was_sampled():
    policy = embedded()
    policy.version = 7
    groups = [
        TrajectoryGroup(
            [
                trajectory(0.0, choice([20, 21, 22], [9], policy_version=4)),
                trajectory(1.0, choice([25], [9], policy_version=7)),
                trajectory(0.5, choice([26], [9], policy_version=None)),  # the engine didn't say
            ]
        )
    ]
    out = Trainer(policy).train(prepare(groups, context=512), resolve()).metrics.compute()
    assert out["staleness/mean"] == pytest.approx(3 * 3 / 4)  # over the four that have a version
    assert out["staleness/max"] == 3


def test_the_batch_is_described_by_trajectory_group_and_token(steps: list[Step]):
    groups = [two_samples(reward) for reward in (0.0, 1.0, 1.0)]
    out = Trainer(embedded()).train(prepare(groups, context=512), resolve())
    metrics = out.metrics.compute()
    expected = {
        "train/reward": 5 / 6,
        "train/reward_std": 0.5 / 3,
        "train/trajectories": 6,
        "train/groups_zero_advantage": 2,
        "tokens/prompt": 3 * (4 + 1),
        "tokens/completion": 3 * (4 + 5),
        "tokens/completion_mean": 27 / 6,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


# Minibatches without an advantage


def away(policy: Policy) -> Policy:
    """The policy moved off its reference, so that the KL term has a gradient."""
    with torch.no_grad():
        policy.head.weight.mul_(1.05)
    return policy


@pytest.mark.parametrize("flat", [(0, 1, 2, 3), (0, 1, 3)])
def test_a_kl_term_alone_is_a_step(flat: tuple[int, ...]):
    policy = away(embedded())
    trainer = Trainer(policy, lambda: load_policy("embedded:sort"))
    before = weights(policy)
    out = trainer.train(batch_of(policy, flat), resolve(TrainConfig(kl_penalty_coef=0.1)))
    metrics = out.metrics.compute()
    assert (out.updates, out.skipped, policy.version) == (4, None, 1)
    assert "optim/skipped" not in metrics
    assert metrics["loss/kl"] > 1e-4
    assert metrics["optim/grad_norm"] > 0
    assert metrics["train/groups_zero_advantage"] == len(flat)
    assert any(not torch.equal(p, before[n]) for n, p in policy.trainable.items())
    # What has no advantage can't be clipped, and is no part of that share.
    assert ("ratio/clip_fraction" in metrics) == (len(flat) < 4)


def test_a_kl_term_alone_draws_the_policy_to_its_reference():
    policy = away(embedded())
    trainer = Trainer(policy, lambda: load_policy("embedded:sort"))
    settings = resolve(
        TrainConfig(learning_rate=1e-5, kl_penalty_coef=1.0), dev.TrainConfig(minibatches=1)
    )
    batch = batch_of(policy, (0, 1, 2, 3))
    before, after = (trainer.train(batch, settings).metrics.compute()["loss/kl"] for _ in range(2))
    assert after < 0.9 * before


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_the_share_that_is_logged_is_the_share_that_auto_epsilon_steers(kl_coef: float):
    policy = away(embedded())
    trainer = Trainer(policy, lambda: load_policy("embedded:sort"))
    options = dev.TrainConfig(epsilon=0.8, epsilon_high=1.0, minibatches=1)
    settings = resolve(TrainConfig(kl_penalty_coef=kl_coef), options)
    out = trainer.train(batch_of(policy, (1, 2), groups=6), settings)
    seen = [trace for traces in out.traces.values() for trace in traces]
    signal = [trace for trace in seen if trace.advantage != 0]
    assert (len(signal), len(seen)) == (16, 24 if kl_coef else 16)
    needed = [needed_epsilon(settings.objective, trace) > 0.8 for trace in signal]
    metrics = out.metrics.compute()
    assert 0 < metrics["ratio/clip_fraction"] < 1
    assert metrics["ratio/clip_fraction"] == sum(needed) / 16
    assert metrics["ratio/clip_fraction"] == sum(t.clipped_tokens > 0 for t in signal) / 16
    # One step on the weights that sampled: all that is clipped is a mismatch.
    assert metrics["mismatch/clip_fraction"] == metrics["ratio/clip_fraction"]
    assert metrics["ratio/log_mean"] == pytest.approx(sum(t.log_ratio for t in signal) / 16)


def test_the_reference_is_loaded_once():
    policy, loaded = embedded(), []

    def load() -> Policy:
        loaded.append(1)
        return load_policy("embedded:sort")

    trainer = Trainer(policy, load)
    batch = batch_of(policy)
    trainer.train(batch, resolve())
    assert not loaded
    for _ in range(2):
        trainer.train(batch, resolve(TrainConfig(kl_penalty_coef=0.1)))
    assert len(loaded) == 1


def test_with_a_reference_rows_wait_for_one_another(monkeypatch: pytest.MonkeyPatch):
    """A reference may be the policy with its adapters off, which is off for every thread."""
    policy = embedded()
    policy.workers = Workers(2)
    mapped: list[int] = []
    whole = policy.workers.map
    monkeypatch.setattr(policy.workers, "map", lambda f, rows: mapped.append(1) or whole(f, rows))
    batch = batch_of(policy)
    options = dev.TrainConfig(packed_sequence_length=60, minibatches=1)
    trainer = Trainer(policy, lambda: load_policy("embedded:sort"))
    trainer.train(batch, resolve(TrainConfig(kl_penalty_coef=0.1), options))
    assert not mapped
    trainer.train(batch, resolve(options=options))
    assert mapped


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_are_recomputed_without_train_mode(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool
):
    """In train mode a model may drop out or jitter, and be another policy than the one sampled."""
    policy, modes = embedded(activation_checkpointing=checkpointing), []
    inner = Policy.logprobs
    monkeypatch.setattr(
        Policy,
        "logprobs",
        lambda policy, *args: modes.append(policy.lm.training) or inner(policy, *args),
    )
    Trainer(policy).train(batch_of(policy), resolve())
    assert modes == [False] * 4


@pytest.mark.parametrize("bad", [False, True])
def test_a_policy_samples_in_eval_mode_after_a_call(bad: bool):
    policy = embedded(activation_checkpointing=True)
    batch = batch_of(policy)
    if bad:
        with torch.no_grad():
            policy.head.weight.fill_(math.nan)
        with pytest.raises(NumericsError):
            Trainer(policy).train(batch, resolve())
    else:
        Trainer(policy).train(batch, resolve())
    assert not policy.lm.training


def test_without_a_kl_term_a_flat_minibatch_is_no_step():
    policy = embedded()
    out = Trainer(policy).train(batch_of(policy, (0, 1, 3)), resolve())
    assert (out.updates, out.skipped) == (1, None)
    assert out.metrics.compute()["optim/skipped"] == 3


def test_dapo_leaves_flat_groups_out_of_the_kl_term_too():
    """As dynamic sampling would have: so a batch of flat groups alone is skipped."""
    policy = away(embedded())
    trainer = Trainer(policy, lambda: load_policy("embedded:sort"))
    settings = resolve(TrainConfig(kl_penalty_coef=0.1), dev.TrainConfig(algorithm="dapo"))
    out = trainer.train(batch_of(policy, (0, 1, 2, 3)), settings)
    assert (out.updates, policy.version) == (0, 0)
    assert out.skipped is not None and "equal rewards" in out.skipped


# Numbers that are not finite


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("algorithm", ["gspo", "gspo_token", "grpo", "dppo", "rloo"])
def test_a_loss_that_is_not_finite_is_no_update(algorithm: Any, threads: int):
    """The bound on ratios gives NaN a gradient of 0: the gradient alone would not tell."""
    policy = embedded(threads=threads)
    batch = batch_of(policy)
    (sample,) = batch.samples[5]
    bad = dataclasses.replace(sample, temperatures=np.full_like(sample.temperatures, np.nan))
    samples = (*batch.samples[:5], (bad,), *batch.samples[6:])
    batch = dataclasses.replace(batch, samples=samples)
    before = weights(policy)
    options = dev.TrainConfig(
        algorithm=algorithm, minibatches=1, max_grad_norm=None, packed_sequence_length=60
    )
    with pytest.raises(NumericsError, match=r"loss is nan.*trajectory 5 \(1 in all\).*not made"):
        Trainer(policy).train(batch, resolve(options=options))
    for name, parameter in policy.trainable.items():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert policy.version == 0


def test_huge_rewards_are_no_equal_rewards():
    policy = embedded()
    groups = random_groups(policy)
    for t, reward in zip(groups[0], (1e99, 1.0, 1.0, 1.0), strict=True):
        t.reward = reward
    out = Trainer(policy).train(prepare(groups, context=512), resolve())
    metrics = out.metrics.compute()
    assert metrics["train/groups_zero_advantage"] == 0
    assert metrics["train/reward_std"] == pytest.approx(1e99 * math.sqrt(3) / 4 / 3, rel=1e-6)
    assert all(math.isfinite(value) for value in metrics.values())
