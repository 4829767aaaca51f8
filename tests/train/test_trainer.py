"""A training step: the same loss, gradient, metrics and weights however the batch is split."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from gspo import TrajectoryGroup, dev
from gspo.config import TrainConfig
from gspo.core.errors import NumericsError
from gspo.objective import PRESETS
from gspo.policy.load import load_policy
from gspo.policy.policy import Policy
from gspo.serve.engine import Request, SamplingParams
from gspo.serve.torch_engine import TorchEngine
from gspo.train import trainer as trainer_module
from gspo.train.minibatches import RolloutBatch, prepare
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer
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


def accumulated(policy: Policy, batch: RolloutBatch, budget: int, packing: str = "buckets"):
    policy.packing = packing  # pyright: ignore[reportAttributeAccessIssue]
    options = dev.TrainConfig(
        epsilon=0.3,
        epsilon_high=0.5,
        packed_sequence_length=budget,
        logprob_calculation_chunk_size=17,
        share_prefixes=False,
    )
    gradient, metrics = gradient_of(policy, batch, resolve(options=options))
    policy.packing = "buckets"
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


@pytest.mark.parametrize("packing", ["buckets", "mask", "single"])
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
    inner = trainer_module.pack
    monkeypatch.setattr(
        trainer_module,
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
    for text in ("918273645546", "192837465501", "000111222333", "555666777888"):
        prompt = tuple(engine.encode_chat([{"role": "user", "content": text}]))
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
    trainer = Trainer(policy, lambda: load_policy("embedded:sort"))
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
    for text in ("918273645546", "192837465501", "000111222333", "555666777888"):
        prompt = tuple(engine.encode_chat([{"role": "user", "content": text}]))
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


def test_a_range_beside_the_spread_is_information_and_told_once(caplog):
    """Every short run at the paper's range would warn: a warning that always comes is none."""
    policy = embedded()
    trainer = Trainer(policy)
    batch = prepare(engine_groups(policy), context=512)
    settings = resolve(TrainConfig(learning_rate=1e-3))
    with caplog.at_level("INFO", "gspo"):
        for _ in range(2):
            trainer.train(batch, settings)
    (told,) = [r for r in caplog.records if "epsilon='auto'" in r.message]
    assert told.levelname == "INFO"


@pytest.mark.parametrize("algorithm", list(PRESETS))
def test_every_preset_trains(algorithm: str):
    policy = embedded()
    before = {n: p.detach().clone() for n, p in policy.trainable.items()}
    options = dev.TrainConfig(algorithm=algorithm)  # pyright: ignore[reportArgumentType]
    settings = resolve(TrainConfig(learning_rate=1e-4), options)
    batch = prepare(engine_groups(policy), context=512, advantage=settings.advantage)
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
