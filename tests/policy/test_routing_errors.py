"""What cannot be recorded or replayed is refused, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gspo.core.errors import ConfigError, DataError, ModelError, NumericsError
from gspo.policy.policy import Policy
from policy.routers import moe, phimoe
from policy.test_moe import own_routes, row_of
from policy.test_policy import tiny


@pytest.fixture(scope="module")
def policy() -> Policy:
    return moe()


def test_a_replay_that_does_not_fit_is_an_error(policy: Policy):
    row = row_of(policy)
    routes = own_routes(policy, row)
    for wrong, message in (
        (torch.cat([routes, routes[:1]]), "consumed whole"),
        (routes[:-1], "were to be replayed"),
        (routes[:, :2], "routes of 2 layers"),
        (routes[..., :1], "were to be replayed"),
        (routes + 7, "the model has 8"),
    ):
        with pytest.raises(DataError, match=message), policy.routing.observe(wrong):
            policy.logprobs(row)
    with pytest.raises(DataError, match="consumed whole"), policy.routing.observe(routes):
        pass
    assert torch.equal(own_routes(policy, row), routes), "nothing is left behind"


def test_a_layer_that_is_missed_is_an_error(policy: Policy):
    row = row_of(policy)
    layers = policy.lm.model.layers  # pyright: ignore[reportAttributeAccessIssue]
    block = layers[1].mlp
    own, block.forward = block.forward, lambda x: x
    with pytest.raises(DataError, match="not the same"), policy.routing.observe():
        policy.logprobs(row)
    block.forward = own


def test_dense_models_and_strange_routers_are_refused():
    dense = tiny(LlamaForCausalLM, LlamaConfig)
    with pytest.raises(ConfigError, match="asked of a dense model: LlamaForCausalLM"):
        dense.routing.require("routing_replay='rollout'")
    strange = phimoe()
    strange.routing.require("replay")
    row = row_of(strange)
    with (
        pytest.raises(ModelError, match=r"PhimoeForCausalLM.*makes 0 top-k choices"),
        strange.routing.observe(),
    ):
        strange.logprobs(row)
    with strange.routing.observe(strict=False) as tape:
        strange.logprobs(row)
    assert not tape.seen


def test_experts_without_named_routers_are_not_called_dense(policy: Policy, monkeypatch):
    monkeypatch.setattr(type(policy.lm), "_can_record_outputs", {})
    monkeypatch.setattr(type(policy.backbone), "_can_record_outputs", {})
    unnamed = Policy(policy.lm, None, policy.tokenizer, "x", torch.float32, 128)
    with pytest.raises(ModelError, match="has 8 experts, but transformers names no router"):
        unnamed.routing.require("replay")


def test_nan_router_logits_are_an_error():
    policy = moe()
    with torch.no_grad():
        policy.routing.routers[1].weight.fill_(float("nan"))  # pyright: ignore[reportCallIssue]
    row = row_of(policy)
    with (
        pytest.raises(NumericsError, match="router logits of MoE layer 1 are NaN"),
        policy.routing.observe(),
    ):
        policy.logprobs(row)


def test_an_error_inside_a_router_leaves_no_mode_behind(policy: Policy):
    row = row_of(policy)
    router = policy.routing.routers[0]
    own = router.forward

    def broken(hidden: Tensor) -> Tensor:
        raise RuntimeError("broken router")

    router.forward = broken
    with pytest.raises(RuntimeError, match="broken router"), policy.routing.observe():
        policy.logprobs(row)
    router.forward = own
    assert not policy.routing._state.open
    assert torch.topk(torch.eye(8), 1).indices.flatten().tolist() == list(range(8))
    own_routes(policy, row)
