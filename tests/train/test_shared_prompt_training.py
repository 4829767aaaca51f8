"""Training with shared prefixes: weights and metrics are those of training without."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from data.prefixes import branching_groups
from gspo import dev
from gspo.config import TrainConfig
from gspo.core.metrics import Metrics
from gspo.data.packing import pack
from gspo.data.sample import Sample
from gspo.policy.policy import Policy
from gspo.policy.probe import choose_packing
from gspo.train.expert_replay import ExpertReplay
from gspo.train.minibatches import RolloutBatch, prepare
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer
from policy.routers import moe
from policy.test_policy import tiny
from support import embedded, recompute_layers

DESCRIBE_THE_PACKING = {
    "tokens/packed_efficiency",
    "tokens/computed",
    "tokens/shared_saving",
    "time/train",
}


def batch_of(policy: Policy, **shape: int) -> RolloutBatch:
    return prepare(branching_groups(**shape), context=policy.context)


def dense() -> Policy:
    policy = tiny(LlamaForCausalLM, LlamaConfig)
    choose_packing(policy)
    return policy


def checkpointed() -> Policy:
    policy = moe()
    recompute_layers(policy)
    policy.checkpointing = True
    return policy


def lora() -> Policy:
    return embedded(lora=dev.LoraConfig(r=2))


def trained(
    policy: Policy, batch: RolloutBatch, kl: float = 0.0, **options: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights and metrics after one call of `train`.

    AdamW's first steps are +-rate whatever the gradient's size: a large epsilon makes them follow
    it, so that a rounding error stays one.
    """
    usual = {"minibatches": 2, "epsilon": 0.5, "adam_epsilon": 1.0, "max_grad_norm": None}
    settings = resolve(
        TrainConfig(learning_rate=1e-2, kl_penalty_coef=kl), dev.TrainConfig(**(usual | options))
    )
    out = Trainer(policy).train(batch, settings)
    return {n: p.detach().clone() for n, p in policy.trainable.items()}, out.metrics.compute()


def assert_same_training(
    build: Callable[[], Policy], batch: RolloutBatch, *, exact: float = 1e-4, **options: Any
) -> dict[str, float]:
    """Metrics of the shared side, after both were compared."""
    policy = build()
    before = {n: p.detach().clone() for n, p in policy.trainable.items()}
    shared, got = trained(policy, batch, **options)
    apart, expected = trained(build(), batch, share_prefixes=False, **options)
    assert got["tokens/shared_saving"] > 0.3
    assert expected["tokens/shared_saving"] == 0
    assert got["tokens/computed"] == pytest.approx(
        expected["tokens/computed"] * (1 - got["tokens/shared_saving"])
    )
    assert set(got) == set(expected)
    for name in set(got) - DESCRIBE_THE_PACKING:
        assert got[name] == pytest.approx(expected[name], rel=exact, abs=1e-5), name
    moved = max(float((shared[n] - old).abs().max()) for n, old in before.items())
    assert moved > 1e-5
    for name, value in shared.items():
        torch.testing.assert_close(value, apart[name], atol=exact * moved, rtol=0, msg=name)
    return got


@pytest.mark.parametrize("build", [dense, moe, checkpointed, lora])
def test_training_is_the_same(build: Callable[[], Policy]):
    assert_same_training(build, batch_of(build()))


@pytest.mark.parametrize("budget", [1, 90, 200])
def test_whatever_the_budget(budget: int):
    policy = dense()
    batch = batch_of(policy)
    shared, got = trained(policy, batch, packed_sequence_length=budget)
    apart, expected = trained(dense(), batch, share_prefixes=False)
    for name in set(got) - DESCRIBE_THE_PACKING:
        assert got[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    for name, value in shared.items():
        torch.testing.assert_close(value, apart[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 2},
        {"old_logprobs": "trainer"},
        {"sequence_unit": "turn"},
        {"algorithm": "grpo"},
        {"algorithm": "dapo"},
        {"kl": 0.1},
    ],
)
def test_with_every_option_that_makes_another_forward_pass_or_loss(options: dict[str, Any]):
    assert_same_training(lora, batch_of(lora()), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"measure_routing": True},
        {"router_aux_loss_coef": 0.1},
        {"routing_replay": "old_policy", "measure_routing": True},
        {"routing_replay": "old_policy", "router_aux_loss_coef": 0.1, "epochs": 2},
    ],
)
@pytest.mark.parametrize("build", [moe, checkpointed])
def test_routing_and_its_metrics(build: Callable[[], Policy], options: dict[str, Any]):
    metrics = assert_same_training(build, batch_of(build()), **options)
    assert metrics["moe/load_cv"] > 0
    if "measure_routing" in options:
        assert 0 < metrics["moe/tokens_changed"] < 1
    if "router_aux_loss_coef" in options:
        assert metrics["loss/router_aux"] > 1


def with_engine_choices(policy: Policy, batch: RolloutBatch, noise: float) -> RolloutBatch:
    """As an engine would have routed; on a share of the tokens, each copy by itself, otherwise."""
    rng = np.random.default_rng(0)

    def one(sample: Sample) -> Sample:
        assert sample.expert_choices is not None
        own = sample.expert_choices[:-1].copy()
        other = rng.random(len(own)) < noise
        own[other] = (own[other] + 1) % policy.routers.experts
        return dataclasses.replace(sample, expert_choices=own)

    recorded = ExpertReplay(policy, resolve(), Metrics()).preferred(batch.samples)
    samples = tuple(tuple(one(sample) for sample in own) for own in recorded)
    return dataclasses.replace(batch, samples=samples)


@pytest.mark.parametrize("options", [{}, {"router_aux_loss_coef": 0.1, "old_logprobs": "trainer"}])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_replay_of_the_engines_choices(noise: float, options: dict[str, Any]):
    batch = with_engine_choices(moe(), batch_of(moe()), noise)
    metrics = assert_same_training(moe, batch, routing_replay="rollout", **options)
    assert (metrics["moe/routing_agreement"] == 1) == (noise == 0)


def test_copies_that_the_engine_routed_otherwise_stay_apart():
    policy = moe()
    batch = with_engine_choices(policy, batch_of(policy), 0.2)
    samples = [s for own in batch.samples for s in own]
    (loose,) = pack(samples, 10_000, share=True)
    (strict,) = pack(samples, 10_000, share=True, replay=True)
    assert loose.token_count < strict.token_count <= loose.sample_tokens
    # Only replay needs it: without, tokens are shared and every copy's agreement is counted.
    metrics = assert_same_training(moe, batch, minibatches=1)
    assert 0.5 < metrics["moe/routing_agreement"] < 0.95


def test_r2_leaves_the_first_minibatch_unchanged_to_the_bit():
    batch = batch_of(moe())
    for budget in (100, 10_000):
        options: dict[str, Any] = {"minibatches": 1, "packed_sequence_length": budget}
        plain, expected = trained(moe(), batch, **options)
        replayed, got = trained(moe(), batch, routing_replay="old_policy", **options)
        assert got["loss/policy"] == expected["loss/policy"]
        for name, value in plain.items():
            assert torch.equal(value, replayed[name]), name


def test_training_twice_is_the_same_to_the_bit():
    batch = batch_of(moe())
    one, _ = trained(moe(), batch)
    two, _ = trained(moe(), batch)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def test_a_model_that_cannot_share_trains_unshared():
    policy = dense()
    policy.packing, policy.shares_prompts = "single", False
    batch = batch_of(policy)
    weights, metrics = trained(policy, batch)
    assert metrics["tokens/shared_saving"] == 0
    expected, _ = trained(dense(), batch)
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-4, msg=name)
