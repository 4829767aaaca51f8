"""A training step: the same loss, gradient, metrics and weights however the batch is split."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gspo as art
from gspo import TrajectoryGroup, dev
from gspo.config import TrainConfig
from gspo.core.errors import NumericsError
from gspo.data.sample import Sample, flat
from gspo.objective import PRESETS, Objective
from gspo.policy.load import Policy, load_policy
from gspo.policy.probe import choose_packing
from gspo.policy.workers import Workers
from gspo.serve.engine import Request, SamplingParams
from gspo.serve.selfcheck import check_engine, make_exact
from gspo.serve.torch_engine import TorchEngine
from gspo.serve.verbatim import chat_tokens
from gspo.train import minibatches
from gspo.train import trainer as trainer_module
from gspo.train.epsilon import needed_epsilon
from gspo.train.minibatches import RolloutBatch, prepare
from gspo.train.observe import Observer
from gspo.train.settings import Settings, resolve
from gspo.train.trainer import Trainer
from models import folder, text
from support import choice, embedded, gradient_of, random_groups, trajectory


@pytest.fixture(scope="module")
def policy() -> Policy:
    return embedded()


def batch_of(policy: Policy, **kwargs) -> RolloutBatch:
    return prepare(random_groups(policy, **kwargs), context=policy.context)


def naive_loss(policy: Policy, batch: RolloutBatch, low: float, high: float) -> torch.Tensor:
    """The paper's objective, one sequence at a time: the model's own forward, full logits."""
    losses = []
    for (sample,) in batch.samples:
        tokens = torch.from_numpy(sample.tokens)[None]
        logp = policy.lm(input_ids=tokens).logits[0, :-1].log_softmax(-1)
        chosen = logp.gather(-1, tokens[0, 1:, None]).squeeze(-1)
        mask = torch.from_numpy(sample.ratio_mask)[1:]
        d = (chosen - torch.from_numpy(sample.old_logprobs)[1:])[mask]
        s = d.mean().exp()
        losses.append(
            torch.minimum(s * sample.advantage, s.clamp(1 - low, 1 + high) * sample.advantage)
        )
    return -torch.stack(losses).mean()


def accumulated(policy: Policy, batch: RolloutBatch, budget: int, packing: str = "tiles"):
    policy.packing = packing  # pyright: ignore[reportAttributeAccessIssue]
    options = dev.TrainConfig(
        epsilon=0.3,
        epsilon_high=0.5,
        packed_sequence_length=budget,
        logprob_calculation_chunk_size=17,
        share_prefixes=False,
    )
    gradient, metrics = gradient_of(policy, batch, resolve(options=options))
    policy.packing = "tiles"
    return metrics, gradient


def test_loss_and_gradient_equal_the_naive_loop(policy: Policy):
    batch = batch_of(policy)
    metrics, got = accumulated(policy, batch, 10_000)
    loss = naive_loss(policy, batch, 0.3, 0.5)
    loss.backward()
    expected = {n: p.grad for n, p in policy.trainable.items() if p.grad is not None}
    policy.lm.zero_grad(set_to_none=True)
    assert metrics["loss/policy"] == pytest.approx(loss.item(), abs=1e-6)
    assert 0 < metrics["ratio/clip_fraction"] < 1
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=2e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("packing", ["tiles", "mask", "single"])
@pytest.mark.parametrize("budget", [1, 40, 100])
def test_nothing_depends_on_the_split_into_rows(policy: Policy, budget: int, packing: str):
    batch = batch_of(policy)
    whole, expected = accumulated(policy, batch, 10_000)
    split, got = accumulated(policy, batch, budget, packing)
    assert set(whole) == set(split)
    for name, value in whole.items():
        if name != "tokens/packed_efficiency":  # a property of the packing itself
            assert split[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=2e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("unit", ["trajectory", "turn"])
def test_turn_advantages_do_not_depend_on_the_split_either(policy: Policy, unit: Any):
    """Two turns with prompts that don't extend one another: samples that belong together."""
    singles = [list(group) for group in random_groups(policy, size=8)]
    pairs = [[(a, b) for a, b in zip(g[::2], g[1::2], strict=True)] for g in singles]
    groups = [
        TrajectoryGroup([trajectory(a.reward, *a.choices(), *b.choices()) for a, b in group])
        for group in pairs
    ]
    for group, own in zip(groups, pairs, strict=True):
        for joined, (a, b) in zip(group, own, strict=True):
            joined.turn_rewards = [a.reward, b.reward]
    found = []
    for budget in (1, 60, 10_000):
        options = dev.TrainConfig(
            algorithm="sampo", epsilon=0.4, sequence_unit=unit, packed_sequence_length=budget
        )
        settings = resolve(options=options)
        batch = prepare(groups, settings, context=policy.context)
        assert len(flat(batch.samples)) == 2 * len(batch.samples)
        found.append(gradient_of(policy, batch, settings))
    (gradient, metrics), *others = found
    assert 0 < metrics["ratio/clip_fraction_tokens"] < 1
    for got, seen in others:
        for name in ("loss/policy", "ratio/clip_fraction", "ratio/clip_fraction_positive"):
            assert seen[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name
        for name, value in gradient.items():
            torch.testing.assert_close(got[name], value, atol=2e-6, rtol=1e-4, msg=name)


def test_order_of_trajectories_changes_nothing(policy: Policy):
    groups = random_groups(policy)
    turned = [TrajectoryGroup(list(reversed(g.trajectories))) for g in reversed(groups)]
    one, a = accumulated(policy, prepare(groups, context=512), 64)
    two, b = accumulated(policy, prepare(turned, context=512), 64)
    for name, value in one.items():
        if name != "tokens/packed_efficiency":
            assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, atol=2e-6, rtol=1e-4, msg=name)


def test_flat_groups_cost_no_forward_but_count_in_n(policy: Policy, monkeypatch):
    groups = random_groups(policy, groups=2)
    for t in groups[1]:
        t.reward = 0.5
    seen: list[int] = []
    inner = minibatches.pack
    monkeypatch.setattr(
        minibatches,
        "pack",
        lambda samples, *args, **share: seen.append(len(samples)) or inner(samples, *args, **share),
    )
    trainer = Trainer(embedded())
    settings = resolve(options=dev.TrainConfig(minibatches=1))
    out = trainer.train(prepare(groups, context=512), settings)
    metrics = out.metrics.compute()
    assert sum(seen) == 4
    assert metrics["train/groups_zero_advantage"] == 1
    loss = naive_loss(policy, prepare(groups, context=512), 3e-4, 4e-4)
    assert metrics["loss/policy"] == pytest.approx(loss.item(), abs=1e-6)


def test_all_groups_flat_is_no_update_and_says_why():
    policy = embedded()
    before = {n: p.detach().clone() for n, p in policy.trainable.items()}
    trainer = Trainer(policy)
    groups = random_groups(policy)
    for group in groups:
        for t in group:
            t.reward = 1.0
    out = trainer.train(prepare(groups, context=512), resolve())
    assert out.updates == 0
    assert out.skipped is not None and "equal rewards" in out.skipped
    assert policy.version == 0
    for name, parameter in policy.trainable.items():
        assert torch.equal(parameter, before[name])


def test_minibatches_and_epochs_are_optimizer_steps():
    trainer = Trainer(embedded())
    batch = batch_of(trainer.policy, groups=4)
    out = trainer.train(batch, resolve(options=dev.TrainConfig(minibatches=3, epochs=2)))
    assert out.updates == 6
    assert trainer.policy.version == 1
    assert trainer.step == 1


def test_on_policy_the_first_minibatch_has_ratio_one_and_the_clip_acts_later():
    policy = embedded()
    from gspo.serve.engine import Request, SamplingParams
    from gspo.serve.torch_engine import TorchEngine

    engine = TorchEngine(policy)
    groups = []
    for question in ("918273645546", "192837465501", "000111222333", "555666777888"):
        prompt = tuple(chat_tokens(engine, [{"role": "user", "content": question}]))
        done = engine.generate([Request(prompt, SamplingParams(n=8, max_tokens=16))])[0]
        groups.append(
            TrajectoryGroup(
                trajectory(float(i), choice(c.token_ids, prompt, c.logprobs))
                for i, c in enumerate(done)
            )
        )
    batch = prepare(groups, context=512)
    first = Trainer(embedded()).train(batch, resolve(options=dev.TrainConfig(minibatches=1)))
    metrics = first.metrics.compute()
    assert metrics["ratio/log_abs_max"] < 1e-5
    assert metrics["ratio/clip_fraction"] == 0
    four = Trainer(policy).train(batch, resolve(TrainConfig(learning_rate=1e-3))).metrics.compute()
    assert four["ratio/clip_fraction"] > 0.1


def test_kl_is_zero_at_the_base_model_and_grows_away_from_it():
    policy = embedded()
    trainer = Trainer(policy, lambda _: load_policy("embedded:sort"))
    batch = batch_of(policy)
    settings = resolve(TrainConfig(learning_rate=1e-2, kl_penalty_coef=0.1))
    first = trainer.train(
        batch, resolve(TrainConfig(kl_penalty_coef=0.1), dev.TrainConfig(minibatches=1))
    )
    assert first.metrics.compute()["loss/kl"] == pytest.approx(0, abs=1e-9)
    trainer.train(batch, settings)
    assert trainer.train(batch, settings).metrics.compute()["loss/kl"] > 1e-3


def test_kl_with_lora_uses_the_model_without_adapters():
    policy = embedded(lora=dev.LoraConfig(r=2))
    trainer = Trainer(policy)
    batch = batch_of(policy)
    settings = resolve(TrainConfig(learning_rate=1e-2, kl_penalty_coef=0.1))
    out = trainer.train(batch, settings).metrics.compute()
    assert out["loss/kl"] > 0
    assert math.isfinite(out["loss/policy"])


def test_extreme_ratios_are_counted_and_stay_finite():
    policy = embedded()
    groups = random_groups(policy)
    for group in groups:
        for t in group:
            c = t.choices()[0]
            c.token_logprobs = [-9e3] * len(c.token_ids)  # pyright: ignore[reportAttributeAccessIssue]
    out = Trainer(policy).train(prepare(groups, context=512), resolve()).metrics.compute()
    assert out["ratio/extreme"] == 12
    assert all(math.isfinite(v) for v in out.values())
    assert all(p.isfinite().all() for p in policy.trainable.values())


def test_a_gradient_that_is_not_finite_leaves_the_weights():
    policy = embedded()
    with torch.no_grad():
        policy.lm.get_input_embeddings().weight[20:40] = float("nan")  # pyright: ignore[reportIndexIssue]
    before = {n: p.detach().clone() for n, p in policy.trainable.items()}
    with pytest.raises(NumericsError, match="the update was not made"):
        Trainer(policy).train(batch_of(policy), resolve())
    for name, parameter in policy.trainable.items():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num())


def test_a_step_that_failed_leaves_no_gradient_behind(monkeypatch: pytest.MonkeyPatch):
    """What came before an out-of-memory error, say, must not be added to the next step."""
    settings = resolve(options=dev.TrainConfig(minibatches=1, packed_sequence_length=40))
    norms = []
    for fails in (False, True):
        policy = embedded()
        trainer, batch = Trainer(policy), batch_of(policy)
        if fails:
            rows = itertools.count()
            with monkeypatch.context() as patch:

                def second_fails(*args, inner=Policy.logprobs, rows=rows, **kwargs):
                    if next(rows) == 1:
                        raise MemoryError("no room")
                    return inner(*args, **kwargs)

                patch.setattr(Policy, "logprobs", second_fails)
                with pytest.raises(MemoryError):
                    trainer.train(batch, settings)
            assert next(rows) == 2
        norms.append(trainer.train(batch, settings).metrics.compute()["optim/grad_norm"])
    assert norms[0] == norms[1]


def test_a_trajectory_in_two_samples_is_one_sequence():
    """Its ratio is the mean over both parts, and N counts it once."""
    policy = embedded()
    broken = trajectory(1.0, choice([20, 21], [9, 8]), choice([30, 31, 32], [7, 7, 7]))
    plain = trajectory(0.0, choice([25, 26], [9, 8]))
    batch = prepare([TrajectoryGroup([broken, plain])], context=512)
    assert [len(own) for own in batch.samples] == [2, 1]
    settings = resolve(options=dev.TrainConfig(minibatches=1, epsilon=1.0, epsilon_high=1.0))
    d = []
    with torch.no_grad():
        for sample in batch.samples[0]:
            tokens = torch.from_numpy(sample.tokens)[None]
            logp = policy.lm(tokens).logits[0, :-1].log_softmax(-1)
            chosen = logp.gather(-1, tokens[0, 1:, None]).squeeze(-1)
            d.append((chosen + 1.0)[torch.from_numpy(sample.ratio_mask)[1:]])
    expected = torch.cat(d).mean().item()
    out = Trainer(policy).train(batch, settings).metrics
    assert any(v == pytest.approx(expected, abs=1e-5) for v in out._values["ratio/log"])
    assert out.compute()["tokens/trained"] == 7


def engine_groups(policy: Policy, size: int = 8) -> list[TrajectoryGroup]:
    """Rollouts of the policy itself, rewards that differ inside each group."""
    engine = TorchEngine(policy)
    groups = []
    for question in ("918273645546", "192837465501", "000111222333", "555666777888"):
        prompt = tuple(chat_tokens(engine, [{"role": "user", "content": question}]))
        done = engine.generate([Request(prompt, SamplingParams(n=size, max_tokens=16))])[0]
        groups.append(
            TrajectoryGroup(
                trajectory(float(i), choice(c.token_ids, prompt, c.logprobs))
                for i, c in enumerate(done)
            )
        )
    return groups


def test_trainer_logprobs_are_fixed_before_the_first_update():
    """Recomputed per update, every ratio would be 1 and the clip would never act."""
    policy = embedded()
    batch = prepare(engine_groups(policy), context=512)
    options = dev.TrainConfig(old_logprobs="trainer")
    out = Trainer(policy).train(batch, resolve(TrainConfig(learning_rate=1e-3), options))
    metrics = out.metrics.compute()
    assert metrics["ratio/clip_fraction"] > 0.1
    assert metrics["ratio/log_abs_max"] > 1e-3


def test_trainer_logprobs_remove_a_mismatch_from_the_ratio():
    """An engine that is off by 0.01 nat a token: seen as mismatch, not as a ratio."""
    policy = embedded()
    groups = engine_groups(policy)
    for group in groups:
        for t in group:
            c = t.choices()[0]
            c.token_logprobs = [v - 0.01 for v in c.token_logprobs]  # pyright: ignore[reportAttributeAccessIssue]
    batch = prepare(groups, context=512)
    once = {"minibatches": 1, "scale_rewards": True}
    results = {}
    for old in ("rollout", "trainer"):
        options = dev.TrainConfig(old_logprobs=old, **once)  # pyright: ignore[reportArgumentType]
        results[old] = Trainer(embedded()).train(batch, resolve(options=options)).metrics.compute()
    assert results["rollout"]["ratio/clip_fraction_positive"] == 1
    assert results["trainer"]["ratio/clip_fraction"] == 0
    assert results["trainer"]["ratio/log_abs_max"] < 1e-5
    for metrics in results.values():
        assert metrics["mismatch/log_ratio_mean"] == pytest.approx(0.01, abs=1e-5)
        assert metrics["mismatch/clip_fraction_positive"] == 1
        assert metrics["mismatch/clip_fraction_negative"] == 0


def test_noise_is_warned_of_once(caplog):
    policy = embedded()
    groups = engine_groups(policy)
    for group in groups:
        for t in group:
            c = t.choices()[0]
            c.token_logprobs = [v - 0.01 for v in c.token_logprobs]  # pyright: ignore[reportAttributeAccessIssue]
    trainer = Trainer(policy)
    batch = prepare(groups, context=512)
    for _ in range(2):
        trainer.policy.version = 0  # as if the batch were fresh again
        trainer.train(batch, resolve(TrainConfig(learning_rate=1e-6)))
    (warning,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "noise alone clips" in warning.message


@pytest.mark.parametrize("algorithm", list(PRESETS))
def test_every_preset_trains(algorithm: str):
    policy = embedded()
    before = {n: p.detach().clone() for n, p in policy.trainable.items()}
    options = dev.TrainConfig(algorithm=algorithm)  # pyright: ignore[reportArgumentType]
    settings = resolve(TrainConfig(learning_rate=1e-4), options)
    batch = prepare(engine_groups(policy), settings, context=512)
    out = Trainer(policy).train(batch, settings)
    assert out.updates == settings.minibatches == (1 if algorithm in ("rloo", "reinforce") else 4)
    assert all(math.isfinite(v) for v in out.metrics.compute().values())
    assert any(not torch.equal(p, before[n]) for n, p in policy.trainable.items())


def test_auto_epsilon_moves_and_is_logged():
    policy = embedded()
    trainer = Trainer(policy)
    settings = resolve(TrainConfig(learning_rate=1e-3), dev.TrainConfig(epsilon="auto"))
    used = []
    for _ in range(3):
        batch = prepare(engine_groups(policy), context=512)
        used.append(trainer.train(batch, settings).metrics.compute()["ratio/epsilon_low"])
    assert used[0] == 3e-4
    assert used[2] > used[1] > used[0]
    assert trainer.epsilon.epsilon_low is not None


def test_dapo_leaves_flat_groups_out_of_the_count():
    policy = embedded()
    groups = engine_groups(policy)
    for t in groups[0]:
        t.reward = 1.0
    batch = prepare(groups, context=512)
    options = dev.TrainConfig(algorithm="dapo", minibatches=1)
    whole = Trainer(embedded()).train(batch, resolve(options=options)).metrics.compute()
    without = prepare(groups[1:], context=512)
    alone = Trainer(embedded()).train(without, resolve(options=options)).metrics.compute()
    assert whole["loss/policy"] == pytest.approx(alone["loss/policy"], abs=1e-6)
    assert whole["optim/grad_norm"] == pytest.approx(alone["optim/grad_norm"], rel=1e-4)


# Which optimizer steps a call takes: in which order, at which rate, how far.

RATE = 1e-3


def four_groups(policy: Policy, flat: tuple[int, ...] = (), **extra: Any) -> RolloutBatch:
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
    pack, loss = minibatches.microbatches, trainer_module.policy_loss

    def packed(policy: Policy, minibatch: Any, settings: Settings, **how: Any) -> Any:
        seen.append(Step(flat(minibatch), settings.sequence_unit))
        return pack(policy, minibatch, settings, **how)

    def policy_loss(*args: Any, **given: Any) -> Any:
        step = seen[-1]
        step.total_sequences, step.total_tokens = given["total_sequences"], given["total_tokens"]
        return loss(*args, **given)

    monkeypatch.setattr(minibatches, "microbatches", packed)
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
    batch = four_groups(trainer.policy)
    settings = resolve(TrainConfig(learning_rate=RATE), dev.TrainConfig(lr_warmup_steps=2))
    first = trainer.train(batch, settings).metrics.compute()
    for _ in range(2):
        trainer.train(batch, settings)
    expected = [RATE * (k + 1) / 8 for k in range(8)] + [RATE] * 4
    assert rates == pytest.approx(expected)
    assert first["optim/learning_rate"] == pytest.approx(sum(expected[:4]) / 4)


def test_a_decay_goes_on_inside_a_call_and_ends_after_the_last_update(rates: list[float]):
    trainer = Trainer(embedded())
    batch = four_groups(trainer.policy)
    options = dev.TrainConfig(lr_schedule="linear", lr_total_steps=2, minibatches=2, epochs=2)
    for _ in range(2):
        trainer.train(batch, resolve(TrainConfig(learning_rate=RATE), options))
    assert rates == pytest.approx([RATE * (8 - k) / 8 for k in range(8)])


def test_a_skipped_minibatch_keeps_its_place_in_the_schedule(rates: list[float]):
    trainer = Trainer(embedded())
    batch = four_groups(trainer.policy, flat=(0, 1, 3))
    settings = resolve(TrainConfig(learning_rate=RATE), dev.TrainConfig(lr_warmup_steps=1))
    out = trainer.train(batch, settings)
    assert (out.updates, out.metrics.compute()["optim/skipped"]) == (1, 3)
    assert len(rates) == 1
    assert rates[0] in [pytest.approx(RATE * (k + 1) / 4) for k in range(4)]


def test_two_epochs_and_two_calls_have_other_minibatches(steps: list[Step]):
    trainer = Trainer(embedded())
    batch = four_groups(trainer.policy, groups=8, size=2)
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
    batch = four_groups(embedded(), groups=8, size=2)
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
    inner = Observer.record

    def record(self: Observer, step: Any, objective: Objective, *, on_policy: bool) -> None:
        seen.append(on_policy)
        inner(self, step, objective, on_policy=on_policy)

    monkeypatch.setattr(Observer, "record", record)
    policy = embedded()
    policy.version = version  # the samples' is 0
    options = dev.TrainConfig(epochs=2)
    out = Trainer(policy).train(four_groups(policy), resolve(options=options))
    assert seen == [first, *[False] * 7]
    assert {trace.update for traces in out.traces.values() for trace in traces} == {4, 5, 6, 7}
    assert ("mismatch/log_ratio_mean" in out.metrics.compute()) == first


@pytest.mark.parametrize(("unit", "sequences"), [("trajectory", 4), ("turn", 8)])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_n_and_t_count_the_whole_step(steps: list[Step], unit: Any, sequences: int, kl_coef: float):
    """Flat groups too, with and without a forward pass; three turns, the last in another sample."""
    policy = embedded()
    trainer = Trainer(policy, lambda _: load_policy("embedded:sort"))
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
    out = Trainer(policy).train(four_groups(policy), settings).metrics.compute()
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
        "tokens/splits": 3,
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
    trainer = Trainer(policy, lambda _: load_policy("embedded:sort"))
    before = weights(policy)
    out = trainer.train(four_groups(policy, flat), resolve(TrainConfig(kl_penalty_coef=0.1)))
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
    trainer = Trainer(policy, lambda _: load_policy("embedded:sort"))
    settings = resolve(
        TrainConfig(learning_rate=1e-5, kl_penalty_coef=1.0), dev.TrainConfig(minibatches=1)
    )
    batch = four_groups(policy, (0, 1, 2, 3))
    before, after = (trainer.train(batch, settings).metrics.compute()["loss/kl"] for _ in range(2))
    assert after < 0.95 * before


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_the_share_that_is_logged_is_the_share_that_auto_epsilon_steers(kl_coef: float):
    policy = away(embedded())
    trainer = Trainer(policy, lambda _: load_policy("embedded:sort"))
    options = dev.TrainConfig(epsilon=0.8, epsilon_high=1.0, minibatches=1)
    settings = resolve(TrainConfig(kl_penalty_coef=kl_coef), options)
    out = trainer.train(four_groups(policy, (1, 2), groups=6), settings)
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

    def load(name: str | None) -> Policy:
        loaded.append(name)
        return load_policy("embedded:sort")

    trainer = Trainer(policy, load)
    batch = four_groups(policy)
    trainer.train(batch, resolve())
    assert not loaded
    for _ in range(2):
        trainer.train(batch, resolve(TrainConfig(kl_penalty_coef=0.1)))
    teacher = dev.TrainConfig(kl_penalty_coef=0.1, kl_reference="teacher")
    for _ in range(2):
        trainer.train(batch, resolve(options=teacher))
    assert loaded == [None, "teacher"]


def test_with_a_reference_rows_wait_for_one_another(monkeypatch: pytest.MonkeyPatch):
    """A reference may be the policy with its adapters off, which is off for every thread."""
    policy = embedded()
    policy.workers = Workers(2)
    mapped: list[int] = []
    whole = policy.workers.map
    monkeypatch.setattr(policy.workers, "map", lambda f, rows: mapped.append(1) or whole(f, rows))
    batch = four_groups(policy)
    options = dev.TrainConfig(packed_sequence_length=60, minibatches=1)
    trainer = Trainer(policy, lambda _: load_policy("embedded:sort"))
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
        lambda policy, *args, **named: (
            modes.append(policy.lm.training) or inner(policy, *args, **named)
        ),
    )
    Trainer(policy).train(four_groups(policy), resolve())
    assert modes == [False] * 4


@pytest.mark.parametrize("bad", [False, True])
def test_a_policy_samples_in_eval_mode_after_a_call(bad: bool):
    policy = embedded(activation_checkpointing=True)
    batch = four_groups(policy)
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
    out = Trainer(policy).train(four_groups(policy, (0, 1, 3)), resolve())
    assert (out.updates, out.skipped) == (1, None)
    assert out.metrics.compute()["optim/skipped"] == 3


def test_dapo_leaves_flat_groups_out_of_the_kl_term_too():
    """As dynamic sampling would have: so a batch of flat groups alone is skipped."""
    policy = away(embedded())
    trainer = Trainer(policy, lambda _: load_policy("embedded:sort"))
    settings = resolve(TrainConfig(kl_penalty_coef=0.1), dev.TrainConfig(algorithm="dapo"))
    out = trainer.train(four_groups(policy, (0, 1, 2, 3)), settings)
    assert (out.updates, policy.version) == (0, 0)
    assert out.skipped is not None and "equal rewards" in out.skipped


# Numbers that are not finite


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("algorithm", ["gspo", "gspo_token", "grpo", "dppo", "rloo"])
def test_a_loss_that_is_not_finite_is_no_update(algorithm: Any, threads: int):
    """The bound on ratios gives NaN a gradient of 0: the gradient alone would not tell."""
    policy = embedded(threads=threads)
    batch = four_groups(policy)
    (sample,) = batch.samples[5]
    bad = dataclasses.replace(sample, temperatures=np.full_like(sample.temperatures, np.nan))
    samples = (*batch.samples[:5], (bad,), *batch.samples[6:])
    batch = dataclasses.replace(batch, samples=samples)
    before = weights(policy)
    options = dev.TrainConfig(
        algorithm=algorithm, minibatches=1, max_grad_norm=None, packed_sequence_length=60
    )
    with pytest.raises(NumericsError, match=r"loss is nan.*not finite: \[5\].*not made"):
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


# Evaluation mode: on unchanged weights each ratio is 1, whatever is random in train mode.


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["opt", "jitter", "qwen3_next", "granite"])
def test_the_first_step_has_ratio_one(kind: str, recompute: bool, tmp_path: Path):
    config = dev.InternalModelConfig(activation_checkpointing=recompute)
    policy = load_policy(folder(tmp_path, kind), config)
    choose_packing(policy)
    engine = TorchEngine(policy)
    check_engine(engine)
    prompt = tuple(text(7).tolist())
    params = SamplingParams(n=4, max_tokens=12, seed=1, ignore_eos=True)
    (done,) = engine.generate([Request(prompt, params)])
    group = art.TrajectoryGroup(
        [trajectory(float(i), choice(c.token_ids, prompt, c.logprobs)) for i, c in enumerate(done)]
    )
    options = dev.TrainConfig(minibatches=1, packed_sequence_length=30)
    before = [p.detach().clone() for p in policy.trainable.values()]
    metrics = Trainer(policy).train(prepare([group], context=256), resolve(options=options))
    values = metrics.metrics.compute()
    assert values["ratio/log_abs_max"] < 1e-4
    assert values["ratio/clip_fraction"] == 0
    moved = zip(before, policy.trainable.values(), strict=True)
    assert any(bool((old != new).any()) for old, new in moved)


def exact_rollouts(seed: int = 0) -> tuple[Policy, list[TrajectoryGroup]]:
    """A policy that is exact, and groups that its engine sampled."""
    policy = embedded()
    engine = TorchEngine(policy)
    make_exact(engine, required=True)
    params = SamplingParams(n=4, max_tokens=9, seed=seed, expert_choices=True, temperature=0.7)
    groups = []
    for prompt in ((7, 8, 9), tuple(range(6, 46))):
        (answer,) = engine.generate([Request(prompt, params)])
        choices = [
            choice(
                c.token_ids,
                prompt,
                c.logprobs,
                policy_versions=list(c.policy_versions),
                temperature=0.7,
            )
            for c in answer
        ]
        groups.append(TrajectoryGroup([trajectory(float(i), c) for i, c in enumerate(choices)]))
    return policy, groups


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packed_sequence_length": 64},
        {"routing_replay": "old_policy"},
        {"router_aux_loss_coef": 0.01},
        {"old_logprobs": "trainer"},
        {"logprob_calculation_chunk_size": 8},
    ],
)
def test_in_exact_mode_the_first_update_finds_no_difference(options: dict[str, Any]):
    policy, groups = exact_rollouts()
    settings = resolve(options=dev.TrainConfig.model_validate(options))
    out = Trainer(policy).train(prepare(groups, settings, context=128), settings)
    assert out.updates == 4
    assert out.metrics.compute()["mismatch/log_ratio_abs_max"] == 0.0


def test_a_log_prob_that_differs_by_one_bit_refuses_the_step():
    policy, groups = exact_rollouts()
    settings = resolve()
    batch = prepare(groups, settings, context=128)
    sample = next(s for samples in batch.samples for s in samples if s.advantage)
    last = len(sample) - 1
    sample.sampling_logprobs[last] = np.nextafter(sample.sampling_logprobs[last], np.float32(-9))
    before = {name: p.detach().clone() for name, p in policy.trainable.items()}
    trainer = Trainer(policy)
    with pytest.raises(NumericsError, match=r"train step 0: 1 of \d+ log-probs differ") as caught:
        trainer.train(batch, resolve(options=dev.TrainConfig(minibatches=1)))
    assert "the update was not made" in str(caught.value)
    assert all(torch.equal(before[name], p) for name, p in policy.trainable.items())
    policy.exact = False
    assert trainer.train(batch, settings).updates == 4
