"""Routing replay, load balance and routing metrics in the trainer."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gspo import dev
from gspo.config import TrainConfig
from gspo.core.errors import ConfigError, DataError, ModelError, NumericsError
from gspo.core.metrics import Metrics
from gspo.data.packing import PackedBatch
from gspo.data.sample import Sample
from gspo.objective import PRESETS
from gspo.policy.load import recompute_layers
from gspo.policy.policy import Policy
from gspo.train import expert_replay as routing
from gspo.train import step
from gspo.train.expert_replay import StepRouting, recorded_routes
from gspo.train.minibatches import RolloutBatch, prepare
from gspo.train.settings import resolve
from gspo.train.step import StepInput, accumulate
from gspo.train.trainer import Trainer
from policy.routers import moe, phimoe
from policy.test_policy import tiny
from support import embedded, random_groups


def batch_of(policy: Policy, **extra: Any) -> RolloutBatch:
    return prepare(random_groups(policy, **extra), context=policy.context)


def routed(policy: Policy, batch: RolloutBatch, shift: int = 0, missing: int = 1) -> RolloutBatch:
    """The batch as an engine with these weights would have routed it (experts shifted)."""
    routes = iter(recorded_routes(policy, batch.samples, 10_000))

    def one(sample: Sample) -> Sample:
        own = (next(routes)[: len(sample) - missing] + shift) % policy.routing.experts
        return dataclasses.replace(sample, routes=own.astype(np.uint8))

    samples = tuple(tuple(one(sample) for sample in own) for own in batch.samples)
    return dataclasses.replace(batch, samples=samples)


def trained(
    batch: RolloutBatch, policy: Policy | None = None, rate: float = 1e-2, **options: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights and metrics after one call of `train` on a fresh model."""
    policy = policy or moe()
    out = Trainer(policy).train(
        batch, resolve(TrainConfig(learning_rate=rate), options_of(**options))
    )
    weights = {n: p.detach().clone() for n, p in policy.trainable.items()}
    return weights, out.metrics.compute()


def options_of(**options: Any) -> dev.TrainConfig:
    return dev.TrainConfig(**({"minibatches": 3, "epsilon": 0.5} | options))


def stepped(
    policy: Policy, batch: RolloutBatch, budget: int, **options: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradient and metrics of one step, without the update."""
    metrics = Metrics()
    samples = [s for own in batch.samples if own[0].advantage != 0 for s in own]
    work = StepInput(
        samples,
        len(batch.samples),
        sum(int(sample.loss_mask.sum()) for sample in samples),
        budget,
        chunk=None,
        on_policy=True,
        routing=StepRouting(policy, options_of(**options), metrics, on_policy=True),
    )
    accumulate(policy, work, PRESETS["gspo"].objective.with_epsilon(0.3, 0.5), metrics)
    gradient = {n: p.grad for n, p in policy.trainable.items() if p.grad is not None}
    policy.lm.zero_grad(set_to_none=True)
    return gradient, metrics.compute()


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert set(one) == set(two)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def losses(metrics: dict[str, float]) -> dict[str, float]:
    return {n: v for n, v in metrics.items() if n.startswith(("loss/", "ratio/", "optim/"))}


@pytest.mark.parametrize("budget", [30, 10_000])
def test_r2_leaves_the_first_minibatch_unchanged_to_the_bit(budget: int):
    batch = batch_of(moe())
    options: dict[str, Any] = {"minibatches": 1, "packed_sequence_length": budget}
    plain, expected = trained(batch, **options)
    replayed, got = trained(batch, routing_replay="old_policy", **options)
    assert_same(plain, replayed)
    assert losses(got) == losses(expected)


def test_r2_keeps_the_first_policys_experts_in_later_minibatches(monkeypatch):
    policy = moe()
    batch = batch_of(policy)
    samples = [s for own in batch.samples for s in own]
    routes = recorded_routes(policy, batch.samples, 10_000)
    first = {s.trajectory_id: r for s, r in zip(samples, routes, strict=True)}
    replayed: dict[int, Tensor] = {}
    own = StepRouting.observe

    def spying(self: StepRouting, row: PackedBatch) -> Any:
        assert row.routes is not None
        parts = row.routes.split(row.lengths)
        replayed.update(zip(row.trajectory_ids, parts, strict=True))
        return own(self, row)

    monkeypatch.setattr(StepRouting, "observe", spying)
    weights, _ = trained(batch, routing_replay="old_policy")
    assert replayed.keys() == first.keys()
    for trajectory, routes in first.items():
        assert torch.equal(replayed[trajectory], torch.from_numpy(routes).short())
    monkeypatch.undo()
    plain, _ = trained(batch)
    assert any((plain[name] != weights[name]).any() for name in plain)


def test_r3_with_the_policys_own_routes_changes_nothing():
    policy = moe()
    batch = batch_of(policy)
    options: dict[str, Any] = {"minibatches": 1, "packed_sequence_length": 10_000}
    plain, expected = trained(batch, **options)
    replayed, got = trained(routed(policy, batch), routing_replay="rollout", **options)
    assert_same(plain, replayed)
    assert losses(got) == losses(expected)
    assert got["moe/routing_agreement"] == 1.0


def test_r3_with_other_routes_changes_the_step_and_agreement_says_so():
    policy = moe()
    batch = batch_of(policy)
    other = routed(policy, batch, shift=1)
    plain, _ = trained(batch, minibatches=1)
    replayed, got = trained(other, routing_replay="rollout", minibatches=1)
    assert any((plain[n] != replayed[n]).any() for n in plain)
    assert got["moe/routing_agreement"] < 0.9
    _, unreplayed = trained(other, minibatches=1)
    assert unreplayed["moe/routing_agreement"] == pytest.approx(got["moe/routing_agreement"], 0.3)
    _, r2 = trained(other, routing_replay="old_policy", minibatches=1)
    assert r2["moe/routing_agreement"] == unreplayed["moe/routing_agreement"]


@pytest.mark.parametrize("packing", ["buckets", "mask", "single"])
@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_nothing_depends_on_the_split_into_rows(packing: Any, budget: int):
    policy = moe()
    batch = routed(policy, batch_of(policy), shift=1)
    options = {"routing_replay": "rollout", "router_aux_loss_coef": 0.1}
    expected, whole = stepped(policy, batch, 10_000, **options)
    policy.packing = packing
    got, split = stepped(policy, batch, budget, **options)
    assert set(whole) == set(split)
    assert {"moe/load_cv", "moe/routing_agreement", "loss/router_aux"} <= set(whole)
    for name, value in whole.items():
        if name != "tokens/packed_efficiency":
            assert split[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("packing", ["buckets", "single"])
def test_checkpointing_replays_the_same_step(packing: Any):
    policy = moe()
    policy.packing = packing
    batch = routed(policy, batch_of(policy), shift=1)
    options = {"routing_replay": "rollout", "router_aux_loss_coef": 0.1}
    plain, _ = stepped(policy, batch, 40, **options)
    recompute_layers(policy)
    policy.lm.train()
    recomputed, _ = stepped(policy, batch, 40, **options)
    assert_same(plain, recomputed)


def test_several_epochs_and_samples_of_one_trajectory_find_their_routes():
    policy = moe()
    batch = batch_of(policy)
    # Every trajectory in two samples: the second repeats the first.
    doubled = dataclasses.replace(batch, samples=tuple((s, s) for (s,) in batch.samples))
    options: dict[str, Any] = {"routing_replay": "old_policy", "packed_sequence_length": 60}
    weights, metrics = trained(doubled, epochs=2, measure_routing=True, **options)
    assert metrics["optim/updates"] == 6
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize(
    "options",
    [
        {"routing_replay": "old_policy"},
        {"routing_replay": "rollout"},
        {"router_aux_loss_coef": 0.1},
        {"measure_routing": True},
    ],
)
def test_dense_models_are_refused_before_any_work(options: dict[str, Any]):
    policy = tiny(LlamaForCausalLM, LlamaConfig)
    batch = batch_of(policy)
    with pytest.raises(ConfigError, match=f"{next(iter(options))}.*dense model"):
        trained(batch, policy, **options)


def test_rollouts_without_routes_are_refused_before_any_work(monkeypatch):
    policy = moe()
    batch = batch_of(policy)
    monkeypatch.setattr(step, "forward", None)
    monkeypatch.setattr(routing, "forward", None)
    with pytest.raises(ConfigError, match=r"no routes.*return_routes.*'old_policy'"):
        trained(batch, policy, routing_replay="rollout")


def test_routes_that_cover_too_little_or_another_model_are_refused():
    policy = moe()
    batch = batch_of(policy)
    with pytest.raises(ConfigError, match="for 2 of its tokens"):
        trained(routed(policy, batch, missing=3), policy, routing_replay="rollout")
    ((first, *_), *rest) = batch.samples
    strange = dataclasses.replace(first, routes=np.zeros((len(first) - 1, 7, 2), np.uint8))
    with pytest.raises(DataError, match="model of 3 MoE layers"):
        trained(dataclasses.replace(batch, samples=((strange,), *rest)), policy)
    thin = dataclasses.replace(first, routes=np.zeros((len(first) - 1, 3, 1), np.uint8))
    alone = dataclasses.replace(batch, samples=((thin,), *rest))
    with pytest.raises(DataError, match="1 experts, not 2"):
        trained(alone, policy, minibatches=1)


def test_nan_router_logits_end_the_step_before_the_update():
    policy = moe()
    batch = batch_of(policy)
    with torch.no_grad():
        policy.routing.routers[2].weight[0] = float("nan")  # pyright: ignore[reportIndexIssue]
    before = {n: p.detach().clone() for n, p in policy.trainable.items()}
    with pytest.raises(NumericsError, match=r"router logits of MoE layer 2.*update was not made"):
        trained(batch, policy)
    for name, parameter in policy.trainable.items():
        assert parameter.grad is None
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num())


def test_a_router_that_cannot_be_seen_trains_without_routing():
    batch = batch_of(phimoe())
    _, metrics = trained(batch, phimoe())
    assert metrics["optim/updates"] == 3
    assert not any(name.startswith("moe/") for name in metrics)
    refused: list[dict[str, Any]] = [
        {"routing_replay": "old_policy"},
        {"router_aux_loss_coef": 0.1},
    ]
    for options in refused:
        with pytest.raises(ModelError, match="makes 0 top-k choices"):
            trained(batch, phimoe(), **options)


def test_bfloat16_replays_too():
    """Rounding moves the router's own choice; the replayed one stands."""
    exact, rough = moe(), moe()
    rough.compute_dtype = torch.bfloat16
    batch = routed(exact, batch_of(exact))
    _, free = trained(batch, rough, minibatches=1)
    assert 0.5 < free["moe/routing_agreement"] < 1
    other = moe()
    other.compute_dtype = torch.bfloat16
    weights, _ = trained(batch, other, routing_replay="rollout", router_aux_loss_coef=0.1)
    assert all(value.isfinite().all() for value in weights.values())


def test_the_reference_of_the_kl_routes_for_itself():
    """LoRA's reference is the same modules: under replay they must choose freely."""
    policy = embedded(lora=dev.LoraConfig(r=2))
    batch = routed(policy, batch_of(policy), shift=1)
    settings = resolve(
        TrainConfig(kl_penalty_coef=0.1), options_of(routing_replay="rollout", minibatches=1)
    )
    replayed = Trainer(policy).train(batch, settings).metrics.compute()
    assert replayed["loss/kl"] > 1e-3
