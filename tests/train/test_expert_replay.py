"""Replay of expert choices, load balance and `moe/*` metrics in the trainer.

The load-balancing loss and the metrics are compared with loops over samples and tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
from gspo.data.packing import Microbatch
from gspo.data.sample import Sample, TrajectorySamples
from gspo.policy.load import Policy
from gspo.train.expert_replay import ExpertReplay, changed_slots
from gspo.train.minibatches import RolloutBatch, prepare
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer
from policy.routers import moe, phimoe
from policy.test_policy import tiny
from support import embedded, gradient_of, random_groups, recompute_layers

WHOLE = resolve(options=dev.TrainConfig(packed_sequence_length=10_000, share_prefixes=False))


def batch_of(policy: Policy, **extra: Any) -> RolloutBatch:
    return prepare(random_groups(policy, **extra), context=policy.context)


def own_choices(policy: Policy, trajectories: Sequence[TrajectorySamples]) -> list[np.ndarray]:
    """What the routers prefer, for each sample."""
    recorded = ExpertReplay(policy, WHOLE, Metrics()).preferred(trajectories)
    chosen = [sample.expert_choices for samples in recorded for sample in samples]
    return [experts for experts in chosen if experts is not None]


def routed(policy: Policy, batch: RolloutBatch, shift: int = 0, missing: int = 1) -> RolloutBatch:
    """The batch as an engine with these weights would have routed it (experts shifted)."""

    def one(sample: Sample) -> Sample:
        assert sample.expert_choices is not None
        own = (sample.expert_choices[: len(sample) - missing] + shift) % policy.routers.experts
        return dataclasses.replace(sample, expert_choices=own.astype(np.uint8))

    recorded = ExpertReplay(policy, WHOLE, Metrics()).preferred(batch.samples)
    samples = tuple(tuple(one(sample) for sample in own) for own in recorded)
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
    options |= {"packed_sequence_length": budget, "share_prefixes": False}
    settings = resolve(options=options_of(**options))
    return gradient_of(policy, batch, settings)


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
    chosen = own_choices(policy, batch.samples)
    first = {s.trajectory_id: c for s, c in zip(samples, chosen, strict=True)}
    replayed: dict[int, Tensor] = {}
    own = ExpertReplay.watch

    def spying(self: ExpertReplay, microbatch: Microbatch) -> Any:
        assert microbatch.expert_choices is not None
        parts = microbatch.expert_choices.split(microbatch.lengths)
        replayed.update(zip(microbatch.trajectory_ids, parts, strict=True))
        return own(self, microbatch)

    monkeypatch.setattr(ExpertReplay, "watch", spying)
    weights, _ = trained(batch, routing_replay="old_policy")
    assert replayed.keys() == first.keys()
    for trajectory, chosen in first.items():
        assert torch.equal(replayed[trajectory], torch.from_numpy(chosen).short())
    monkeypatch.undo()
    plain, _ = trained(batch)
    assert any((plain[name] != weights[name]).any() for name in plain)


def test_r3_with_the_policys_own_choices_changes_nothing():
    policy = moe()
    batch = batch_of(policy)
    options: dict[str, Any] = {"minibatches": 1, "packed_sequence_length": 10_000}
    plain, expected = trained(batch, **options)
    replayed, got = trained(routed(policy, batch), routing_replay="rollout", **options)
    assert_same(plain, replayed)
    assert losses(got) == losses(expected)
    assert got["moe/routing_agreement"] == 1.0


def test_r3_with_other_choices_changes_the_step_and_agreement_says_so():
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


@pytest.mark.parametrize("packing", ["tiles", "mask", "single"])
@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_nothing_depends_on_the_split_into_microbatches(packing: Any, budget: int):
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


@pytest.mark.parametrize("packing", ["tiles", "single"])
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


def test_several_epochs_and_samples_of_one_trajectory_find_their_choices():
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


def test_rollouts_without_choices_are_refused_before_any_work(monkeypatch):
    policy = moe()
    batch = batch_of(policy)
    monkeypatch.setattr(Policy, "logprobs", None)
    with pytest.raises(ConfigError, match=r"no expert choices.*return_routes.*'old_policy'"):
        trained(batch, policy, routing_replay="rollout")


def test_choices_that_cover_too_little_or_another_model_are_refused():
    policy = moe()
    batch = batch_of(policy)
    with pytest.raises(ConfigError, match="for 2 of its tokens"):
        trained(routed(policy, batch, missing=3), policy, routing_replay="rollout")
    ((first, *_), *rest) = batch.samples
    strange = np.zeros((len(first) - 1, 7, 2), np.uint8), np.full((len(first) - 1, 3, 2), 8)
    for chosen in strange:
        alone = dataclasses.replace(first, expert_choices=chosen)
        with pytest.raises(DataError, match=r"up to expert [08].*3 MoE layers of 8 experts"):
            trained(dataclasses.replace(batch, samples=((alone,), *rest)), policy)
    thin = dataclasses.replace(first, expert_choices=np.zeros((len(first) - 1, 3, 1), np.uint8))
    alone = dataclasses.replace(batch, samples=((thin,), *rest))
    with pytest.raises(DataError, match="1 experts per token, not 2"):
        trained(alone, policy, minibatches=1)


def test_nan_router_logits_end_the_step_before_the_update():
    policy = moe()
    batch = batch_of(policy)
    with torch.no_grad():
        policy.routers.modules[2].weight[0] = float("nan")  # pyright: ignore[reportIndexIssue]
    before = {n: p.detach().clone() for n, p in policy.trainable.items()}
    with pytest.raises(NumericsError, match=r"router logits of MoE layer 2.*update was not made"):
        trained(batch, policy)
    for name, parameter in policy.trainable.items():
        assert parameter.grad is None
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num())


def test_a_router_that_cannot_be_seen_trains_without_replay():
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
    rough.dtype = torch.bfloat16
    batch = routed(exact, batch_of(exact))
    _, free = trained(batch, rough, minibatches=1)
    assert 0.5 < free["moe/routing_agreement"] < 1
    other = moe()
    other.dtype = torch.bfloat16
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


def test_changed_slots_ignore_the_order():
    a = torch.tensor([[[0, 1, 2], [3, 4, 5]]])
    b = torch.tensor([[[2, 0, 1], [5, 6, 7]]])
    assert changed_slots(a, b).tolist() == [[0, 2]]


def naive_balance(policy: Policy, batch: RolloutBatch) -> float:
    """Switch Transformer, equations 4 to 6, one sample at a time, in float64."""
    probabilities: list[list[Tensor]] = [[] for _ in policy.routers.modules]
    hooks = [
        router.register_forward_hook(
            lambda _m, _a, out, i=i: probabilities[i].append(out[0].double().softmax(-1))  # pyright: ignore[reportArgumentType]
        )
        for i, router in enumerate(policy.routers.modules)
    ]
    for sample in (s for own in batch.samples if own[0].advantage != 0 for s in own):
        with torch.no_grad():
            policy.lm(input_ids=torch.from_numpy(sample.tokens)[None])
    for hook in hooks:
        hook.remove()
    total = 0.0
    for parts in probabilities:
        p = torch.cat(parts)
        chosen = torch.zeros_like(p).scatter_(1, p.topk(2).indices, 1.0)
        total += p.shape[1] * float((chosen.mean(0) / 2 * p.mean(0)).sum())
    return total / len(probabilities)


def test_the_load_balancing_loss_is_the_papers():
    policy = moe()
    batch = batch_of(policy)
    _, metrics = stepped(policy, batch, 40, router_aux_loss_coef=0.1)
    assert metrics["loss/router_aux"] == pytest.approx(naive_balance(policy, batch), rel=1e-5)
    assert metrics["loss/router_aux"] > 1
    _, without = stepped(policy, batch, 40)
    assert "loss/router_aux" not in without
    assert metrics["loss/policy"] == pytest.approx(without["loss/policy"], abs=1e-9)


def test_the_load_balancing_loss_balances():
    policy = moe()
    batch = batch_of(policy)
    trainer = Trainer(policy)
    settings = resolve(
        TrainConfig(learning_rate=1e-2), options_of(router_aux_loss_coef=10.0, minibatches=1)
    )
    first = trainer.train(batch, settings).metrics.compute()
    for _ in range(14):
        trainer.train(batch, settings)
    last = trainer.train(batch, settings).metrics.compute()
    assert last["loss/router_aux"] < first["loss/router_aux"]
    assert last["moe/load_cv"] < 0.8 * first["moe/load_cv"]


def test_load_cv_is_the_spread_of_the_loads():
    policy = moe()
    batch = batch_of(policy)
    _, metrics = stepped(policy, batch, 40)
    wanted = [own for own in batch.samples if own[0].advantage != 0]
    chosen = np.concatenate(own_choices(policy, wanted))
    spreads = []
    for layer in range(chosen.shape[1]):
        loads = np.bincount(chosen[:, layer].ravel(), minlength=8)
        spreads.append(loads.std() / loads.mean())
    assert metrics["moe/load_cv"] == pytest.approx(np.mean(spreads))


def test_experts_changed_compares_before_and_after_the_whole_call():
    policy = moe()
    batch = batch_of(policy)
    before = own_choices(policy, batch.samples)
    _, metrics = trained(batch, policy, measure_routing=True)
    after = own_choices(policy, batch.samples)
    slots, tokens, layers = [], [], [[], [], []]
    for old, new in zip(np.concatenate(before), np.concatenate(after), strict=True):
        changed = [len(set(a) - set(b)) for a, b in zip(old, new, strict=True)]
        slots.append(sum(changed) / 6)
        tokens.append(any(changed))
        for layer, count in zip(layers, changed, strict=True):
            layer.append(count / 2)
    assert 0 < metrics["moe/experts_changed"] < 1
    assert metrics["moe/experts_changed"] == pytest.approx(np.mean(slots))
    assert metrics["moe/tokens_changed"] == pytest.approx(np.mean(tokens))
    for i, layer in enumerate(layers):
        assert metrics[f"moe/experts_changed_layer_{i}"] == pytest.approx(np.mean(layer))


def test_no_update_changes_no_expert_and_it_is_off_by_default():
    _, metrics = trained(batch_of(moe()), rate=1e-12, measure_routing=True)
    assert metrics["moe/experts_changed"] == metrics["moe/tokens_changed"] == 0
    _, quiet = trained(batch_of(moe()))
    assert not any(name.startswith(("moe/experts", "moe/tokens")) for name in quiet)
    assert "moe/load_cv" in quiet


def test_a_call_that_fails_after_its_last_update_is_no_step(monkeypatch: pytest.MonkeyPatch):
    def no_room(self: ExpertReplay) -> None:
        raise MemoryError("no room")

    policy = moe()
    trainer = Trainer(policy)
    monkeypatch.setattr(ExpertReplay, "finish", no_room)
    with pytest.raises(MemoryError):
        trainer.train(batch_of(policy), resolve(TrainConfig(learning_rate=1e-3)))
    assert trainer.step == 0
