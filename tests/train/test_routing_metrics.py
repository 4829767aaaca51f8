"""The load-balancing loss and the routing metrics, against loops over samples and tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gspo.config import TrainConfig
from gspo.policy.policy import Policy
from gspo.train.expert_replay import recorded_routes
from gspo.train.minibatches import RolloutBatch
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer
from policy.routers import moe
from train.test_routing_replay import batch_of, options_of, stepped, trained


def naive_balance(policy: Policy, batch: RolloutBatch) -> float:
    """Switch Transformer, equations 4 to 6, one sample at a time, in float64."""
    probabilities: list[list[Tensor]] = [[] for _ in policy.routing.routers]
    hooks = [
        router.register_forward_hook(
            lambda _m, _a, out, i=i: probabilities[i].append(out[0].double().softmax(-1))  # pyright: ignore[reportArgumentType]
        )
        for i, router in enumerate(policy.routing.routers)
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
    routes = np.concatenate(recorded_routes(policy, wanted, 10_000))
    spreads = []
    for layer in range(routes.shape[1]):
        loads = np.bincount(routes[:, layer].ravel(), minlength=8)
        spreads.append(loads.std() / loads.mean())
    assert metrics["moe/load_cv"] == pytest.approx(np.mean(spreads))


def test_experts_changed_compares_before_and_after_the_whole_call():
    policy = moe()
    batch = batch_of(policy)
    before = recorded_routes(policy, batch.samples, 10_000)
    _, metrics = trained(batch, policy, measure_routing=True)
    after = recorded_routes(policy, batch.samples, 10_000)
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
