"""Recording and replaying the choice of experts on plain transformers models.

What cannot be recorded or replayed is refused, and leaves nothing behind.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gspo.core.errors import ConfigError, DataError, ModelError, NumericsError
from gspo.data.packing import Microbatch, pack
from gspo.dev import LoraConfig
from gspo.kernels.hf import find_routers
from gspo.policy import load
from gspo.policy.load import Policy
from gspo.policy.moe import ExpertChoices
from policy.routers import MOE, moe, phimoe
from policy.test_policy import samples, tiny
from support import embedded, recompute_layers


def packed(policy: Policy) -> Microbatch:
    return pack(samples(policy), 10_000)[0]


def own_choices(policy: Policy, microbatch: Microbatch) -> Tensor:
    with torch.no_grad(), policy.routers.watch() as choices:
        policy.logprobs(microbatch)
    return choices.preferred().short()


def passed(
    policy: Policy, microbatch: Microbatch, replay: Tensor | None
) -> tuple[Tensor, dict[str, Tensor], ExpertChoices]:
    """Log-probs, the gradient of their weighted sum (taken outside the block), and the choices."""
    with policy.routers.watch(replay) as choices:
        logprobs = policy.logprobs(microbatch).logprobs
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    gradient = {n: p.grad for n, p in policy.trainable.items() if p.grad is not None}
    policy.lm.zero_grad(set_to_none=True)
    return logprobs.detach(), gradient, choices


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert set(one) == set(two)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.fixture(scope="module")
def policy() -> Policy:
    return moe()


@pytest.mark.parametrize("name", MOE)
def test_replaying_the_policys_own_choices_changes_no_bit(name: str):
    policy = moe(name)
    microbatch = packed(policy)
    plain, expected, choices = passed(policy, microbatch, None)
    layers = len(policy.routers.modules)
    assert choices.preferred().shape[:2] == (microbatch.token_count, layers)
    replayed, got, _ = passed(policy, microbatch, choices.preferred().short())
    assert torch.equal(plain, replayed)
    assert_same(expected, got)


@pytest.mark.parametrize("name", MOE)
def test_a_perturbed_policys_experts_are_taken_on_every_token(name: str):
    policy, other = moe(name), moe(name)
    microbatch = packed(policy)
    with torch.no_grad():
        for router in other.routers.modules:
            for weight in router.parameters():
                weight.add_(torch.randn_like(weight))
    replay = own_choices(other, microbatch)
    plain = policy.logprobs(microbatch).logprobs
    replayed, gradient, choices = passed(policy, microbatch, replay)
    assert torch.equal(choices.used().short(), replay)
    assert (choices.preferred().short() != replay).any()
    assert (plain - replayed).abs().max() > 1e-3
    of_routers = [g for n, g in gradient.items() if ".gate." in n or ".router." in n]
    assert of_routers
    assert all(g.abs().max() > 0 for g in of_routers)


def test_the_experts_that_compute_are_the_replayed_ones(policy: Policy):
    """Seen from the experts' side, not from the choices."""
    microbatch, seen = packed(policy), []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[1].clone()))
        for module in policy.lm.modules()
        if type(module).__name__ == "Qwen3MoeExperts"
    ]
    replay = (own_choices(policy, microbatch) + 3) % 8
    seen.clear()
    passed(policy, microbatch, replay)
    for hook in hooks:
        hook.remove()
    assert torch.equal(torch.stack(seen, dim=1).short(), replay)


def test_tokens_without_a_replay_are_left_to_the_router(policy: Policy):
    microbatch = packed(policy)
    replay = (own_choices(policy, microbatch) + 1) % 8
    replay[::3] = -1
    _, _, choices = passed(policy, microbatch, replay)
    known = replay[:, 0, 0] >= 0
    assert torch.equal(choices.used()[known].short(), replay[known])
    assert torch.equal(choices.used()[~known], choices.preferred()[~known])


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("packing", ["own", "mask", "single"])
def test_packing_and_checkpointing_replay_alike(name: str, packing: str):
    policy = moe(name)
    microbatch = packed(policy)
    replay = (own_choices(policy, microbatch) + 1) % 8
    expected, gradient, _ = passed(policy, microbatch, replay)
    if packing != "own":
        policy.packing = packing  # pyright: ignore[reportAttributeAccessIssue]
    plain, one, _ = passed(policy, microbatch, replay)
    torch.testing.assert_close(plain, expected, atol=5e-5, rtol=1e-5)
    for key, value in gradient.items():
        torch.testing.assert_close(one[key], value, atol=1e-3, rtol=1e-3)
    recompute_layers(policy)
    policy.lm.train()
    recomputed, two, choices = passed(policy, microbatch, replay)
    assert torch.equal(choices.used().short(), replay)
    assert torch.equal(plain, recomputed)
    assert_same(one, two)


def test_recomputation_takes_its_own_choices_whatever_ran_in_between():
    """Two microbatches with different replay and a free pass, all before the first backward."""
    expected = []
    for checkpointing in (False, True):
        policy = moe()
        if checkpointing:
            recompute_layers(policy)
            policy.lm.train()
        microbatches = pack(samples(policy), 60)[:2]
        losses = []
        for shift, microbatch in enumerate(microbatches):
            replay = (own_choices(policy, microbatch) + 1 + shift) % 8
            with policy.routers.watch(replay):
                losses.append(policy.logprobs(microbatch).logprobs.sum())
        policy.logprobs(microbatches[0])
        with policy.routers.watch():
            torch.stack(losses).sum().backward()
        expected.append({n: p.grad for n, p in policy.trainable.items() if p.grad is not None})
    assert_same(*expected)


def test_lora_replays_and_the_base_model_is_left_alone():
    policy = embedded(lora=LoraConfig(r=2))
    assert len(policy.routers.modules) == 2
    microbatch = packed(policy)
    plain, expected, choices = passed(policy, microbatch, None)
    same, got, _ = passed(policy, microbatch, choices.preferred().short())
    assert torch.equal(plain, same)
    assert_same(expected, got)
    replay = (choices.preferred().short() + 1) % 8
    _, gradient, replayed = passed(policy, microbatch, replay)
    assert torch.equal(replayed.used().short(), replay)
    assert any(g.abs().max() > 0 for g in gradient.values())


@pytest.mark.parametrize(("experts", "size"), [(8, 1), (256, 1), (257, 2)])
def test_a_recorded_slot_is_one_byte_up_to_256_experts(experts: int, size: int):
    policy = moe(num_experts=experts)
    microbatch = packed(policy)
    with torch.no_grad(), policy.routers.watch() as choices:
        policy.logprobs(microbatch)
    assert choices.preferred().element_size() == size
    stored = choices.preferred().numpy()
    assert stored.nbytes == size * microbatch.token_count * 3 * 2
    assert int(stored.max()) == int(choices.preferred().max()) < experts


@pytest.mark.parametrize("name", MOE)
def test_a_rounded_router_computes_in_float32(name: str):
    policy = moe(name)
    policy.dtype = torch.bfloat16
    policy.round_weights()
    logits = []
    for router, at in find_routers(policy.lm):
        router.register_forward_hook(lambda _m, _a, out, at=at: logits.append(out[at]))
    microbatch = packed(policy)
    scored = policy.logprobs(microbatch).logprobs
    assert {value.dtype for value in logits} == {torch.float32}
    # Not bfloat16's values in a float32 tensor.
    assert any((value != value.bfloat16().float()).any() for value in logits)
    scored.sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.trainable.values() if p.grad is not None)


def test_two_policies_on_one_model_do_not_disturb_each_other(policy: Policy):
    second = Policy(policy.lm, None, policy.tokenizer, "x", torch.bfloat16, 128)
    microbatch = packed(policy)
    with second.routers.watch() as theirs, policy.routers.watch() as ours:
        second.logprobs(microbatch)
    assert torch.equal(theirs.preferred(), ours.preferred())


def test_loads_count_every_slot(policy: Policy):
    microbatch = packed(policy)
    with torch.no_grad(), policy.routers.watch() as choices:
        policy.logprobs(microbatch)
    loads = choices.loads()
    assert loads.shape == (3, 8)
    assert loads.sum(-1).tolist() == [2 * microbatch.token_count] * 3
    assert loads[1, 5] == (choices.preferred()[:, 1] == 5).sum()


def test_loading_with_checkpointing_hands_the_choices_over():
    policy = load.load_policy(
        "embedded:sort", load.InternalModelConfig(activation_checkpointing=True)
    )
    policy.lm.train()
    microbatch = packed(policy)
    replay = (own_choices(policy, microbatch) + 1) % 8
    _, one, _ = passed(policy, microbatch, replay)
    policy.lm.eval()
    _, two, _ = passed(policy, microbatch, replay)
    assert_same(one, two)


def test_a_replay_that_does_not_fit_is_an_error(policy: Policy):
    microbatch = packed(policy)
    replay = own_choices(policy, microbatch)
    for wrong, message in (
        (torch.cat([replay, replay[:1]]), "consumed whole"),
        (replay[:-1], "were to be replayed"),
        (replay[..., :1], "were to be replayed"),
    ):
        with pytest.raises(DataError, match=message), policy.routers.watch(wrong):
            policy.logprobs(microbatch)
    with pytest.raises(DataError, match="consumed whole"), policy.routers.watch(replay):
        pass
    assert torch.equal(own_choices(policy, microbatch), replay), "nothing is left behind"


def test_a_layer_that_is_missed_is_an_error(policy: Policy):
    microbatch = packed(policy)
    layers = policy.lm.model.layers  # pyright: ignore[reportAttributeAccessIssue]
    block = layers[1].mlp
    own, block.forward = block.forward, lambda x: x
    with pytest.raises(DataError, match="each was to route"), policy.routers.watch():
        policy.logprobs(microbatch)
    block.forward = own


def test_dense_models_and_strange_routers_are_refused():
    dense = tiny(LlamaForCausalLM, LlamaConfig)
    with pytest.raises(ConfigError, match="asked of a dense model: LlamaForCausalLM"):
        dense.routers.require("routing_replay='rollout'")
    strange = phimoe()
    strange.routers.require("replay")
    microbatch = packed(strange)
    with (
        pytest.raises(ModelError, match=r"PhimoeForCausalLM.*makes 0 top-k choices"),
        strange.routers.watch(),
    ):
        strange.logprobs(microbatch)
    with strange.routers.watch(strict=False) as choices:
        strange.logprobs(microbatch)
    assert not choices.complete


def test_experts_without_named_routers_are_refused(policy: Policy, monkeypatch):
    monkeypatch.setattr(type(policy.lm), "_can_record_outputs", {})
    monkeypatch.setattr(type(policy.backbone), "_can_record_outputs", {})
    unnamed = Policy(policy.lm, None, policy.tokenizer, "x", torch.float32, 128)
    with pytest.raises(ConfigError, match="or no router that transformers names"):
        unnamed.routers.require("replay")


def test_nan_router_logits_are_an_error():
    policy = moe()
    with torch.no_grad():
        policy.routers.modules[1].weight.fill_(float("nan"))  # pyright: ignore[reportCallIssue]
    microbatch = packed(policy)
    with (
        pytest.raises(NumericsError, match="router logits of MoE layer 1 are NaN"),
        policy.routers.watch(),
    ):
        policy.logprobs(microbatch)


def test_an_error_inside_a_router_leaves_no_mode_behind(policy: Policy):
    microbatch = packed(policy)
    router: Any = policy.routers.modules[0]
    own, router.weight = router.weight, torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(RuntimeError, match="shape"), policy.routers.watch():
        policy.logprobs(microbatch)
    router.weight = own
    assert not any(policy.routers._watched.values())
    assert torch.topk(torch.eye(8), 1).indices.flatten().tolist() == list(range(8))
    own_choices(policy, microbatch)
