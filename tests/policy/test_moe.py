"""Recording and replaying the choice of experts on plain transformers models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gspo.data.packing import PackedBatch, pack
from gspo.dev import LoraConfig
from gspo.policy import load
from gspo.policy.expert_tape import Tape, as_array, changed_slots
from gspo.policy.load import recompute_layers
from gspo.policy.policy import Policy
from policy.routers import MOE, moe
from policy.test_policy import samples
from support import embedded


def row_of(policy: Policy) -> PackedBatch:
    return pack(samples(policy), 10_000)[0]


def own_routes(policy: Policy, row: PackedBatch) -> Tensor:
    with torch.no_grad(), policy.routing.observe() as tape:
        policy.logprobs(row)
    return tape.own().short()


def passed(
    policy: Policy, row: PackedBatch, routes: Tensor | None
) -> tuple[Tensor, dict[str, Tensor], Tape]:
    """Log-probs, the gradient of their weighted sum (taken outside the block), and the tape."""
    with policy.routing.observe(routes) as tape:
        logprobs = policy.logprobs(row).logprobs
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    gradient = {n: p.grad for n, p in policy.trainable.items() if p.grad is not None}
    policy.lm.zero_grad(set_to_none=True)
    return logprobs.detach(), gradient, tape


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert set(one) == set(two)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.fixture(scope="module")
def policy() -> Policy:
    return moe()


@pytest.mark.parametrize("name", MOE)
def test_replaying_the_policys_own_routes_changes_no_bit(name: str):
    policy = moe(name)
    row = row_of(policy)
    plain, expected, tape = passed(policy, row, None)
    assert tape.own().shape == (row.token_count, len(policy.routing.routers), tape.own().shape[2])
    replayed, got, _ = passed(policy, row, tape.own().short())
    assert torch.equal(plain, replayed)
    assert_same(expected, got)


@pytest.mark.parametrize("name", MOE)
def test_a_perturbed_policys_routes_are_taken_on_every_token(name: str):
    policy, other = moe(name), moe(name)
    row = row_of(policy)
    with torch.no_grad():
        for router in other.routing.routers:
            for weight in router.parameters():
                weight.add_(torch.randn_like(weight))
    routes = own_routes(other, row)
    plain = policy.logprobs(row).logprobs
    replayed, gradient, tape = passed(policy, row, routes)
    assert torch.equal(tape.used().short(), routes)
    assert (tape.own().short() != routes).any()
    assert (plain - replayed).abs().max() > 1e-3
    of_routers = [g for n, g in gradient.items() if ".gate." in n or ".router." in n]
    assert of_routers
    assert all(g.abs().max() > 0 for g in of_routers)


def test_the_experts_that_compute_are_the_replayed_ones(policy: Policy):
    """Seen from the experts' side, not from the tape."""
    row, seen = row_of(policy), []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[1].clone()))
        for module in policy.lm.modules()
        if type(module).__name__ == "Qwen3MoeExperts"
    ]
    routes = (own_routes(policy, row) + 3) % 8
    seen.clear()
    passed(policy, row, routes)
    for hook in hooks:
        hook.remove()
    assert torch.equal(torch.stack(seen, dim=1).short(), routes)


def test_tokens_without_a_route_are_the_routers_own(policy: Policy):
    row = row_of(policy)
    routes = (own_routes(policy, row) + 1) % 8
    routes[::3] = -1
    _, _, tape = passed(policy, row, routes)
    known = routes[:, 0, 0] >= 0
    assert torch.equal(tape.used()[known].short(), routes[known])
    assert torch.equal(tape.used()[~known], tape.own()[~known])


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("packing", ["own", "mask", "single"])
def test_packing_and_checkpointing_replay_alike(name: str, packing: str):
    policy = moe(name)
    row = row_of(policy)
    routes = (own_routes(policy, row) + 1) % 8
    expected, gradient, _ = passed(policy, row, routes)
    if packing != "own" and (name, packing) != ("gpt_oss", "mask"):
        policy.packing = packing  # pyright: ignore[reportAttributeAccessIssue]
    plain, one, _ = passed(policy, row, routes)
    torch.testing.assert_close(plain, expected, atol=5e-5, rtol=1e-5)
    for key, value in gradient.items():
        torch.testing.assert_close(one[key], value, atol=1e-3, rtol=1e-3)
    recompute_layers(policy)
    policy.lm.train()
    recomputed, two, tape = passed(policy, row, routes)
    assert torch.equal(tape.used().short(), routes)
    assert torch.equal(plain, recomputed)
    assert_same(one, two)


def test_recomputation_takes_its_own_tape_whatever_ran_in_between():
    """Two rows with different routes and a free pass, all before the first backward."""
    expected = []
    for checkpointing in (False, True):
        policy = moe()
        if checkpointing:
            recompute_layers(policy)
            policy.lm.train()
        rows = pack(samples(policy), 60)[:2]
        losses = []
        for shift, row in enumerate(rows):
            routes = (own_routes(policy, row) + 1 + shift) % 8
            with policy.routing.observe(routes):
                losses.append(policy.logprobs(row).logprobs.sum())
        policy.logprobs(rows[0])
        with policy.routing.observe():
            torch.stack(losses).sum().backward()
        expected.append({n: p.grad for n, p in policy.trainable.items() if p.grad is not None})
    assert_same(*expected)


def test_lora_replays_and_the_base_model_is_left_alone():
    policy = embedded(lora=LoraConfig(r=2))
    assert len(policy.routing.routers) == 2
    row = row_of(policy)
    plain, expected, tape = passed(policy, row, None)
    same, got, _ = passed(policy, row, tape.own().short())
    assert torch.equal(plain, same)
    assert_same(expected, got)
    routes = (tape.own().short() + 1) % 8
    _, gradient, replayed = passed(policy, row, routes)
    assert torch.equal(replayed.used().short(), routes)
    assert any(g.abs().max() > 0 for g in gradient.values())


@pytest.mark.parametrize(("experts", "size"), [(8, 1), (256, 1), (257, 2)])
def test_a_recorded_slot_is_one_byte_up_to_256_experts(experts: int, size: int):
    policy = moe(num_experts=experts)
    row = row_of(policy)
    with torch.no_grad(), policy.routing.observe() as tape:
        policy.logprobs(row)
    assert tape.own().element_size() == size
    stored = as_array(tape.own(), policy.routing.experts)
    assert stored.nbytes == size * row.token_count * 3 * 2
    assert int(stored.max()) == int(tape.own().max()) < experts


@pytest.mark.parametrize("name", MOE)
def test_the_router_computes_in_float32_under_autocast(name: str):
    policy = moe(name)
    policy.compute_dtype = torch.bfloat16
    logits = []
    for router, at in zip(policy.routing.routers, policy.routing._logits_at, strict=True):
        router.register_forward_hook(lambda _m, _a, out, at=at: logits.append(out[at]))
    row = row_of(policy)
    scored = policy.logprobs(row).logprobs
    assert {value.dtype for value in logits} == {torch.float32}
    # Not bfloat16's values in a float32 tensor.
    assert any((value != value.bfloat16().float()).any() for value in logits)
    scored.sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.trainable.values() if p.grad is not None)


def test_two_policies_on_one_model_do_not_disturb_each_other(policy: Policy):
    second = Policy(policy.lm, None, policy.tokenizer, "x", torch.bfloat16, 128)
    row = row_of(policy)
    with second.routing.observe() as theirs, policy.routing.observe() as ours:
        second.logprobs(row)
    assert torch.equal(theirs.own(), ours.own())
    assert not torch.is_autocast_enabled("cpu")


def test_changed_slots_ignore_the_order():
    a = torch.tensor([[[0, 1, 2], [3, 4, 5]]])
    b = torch.tensor([[[2, 0, 1], [5, 6, 7]]])
    assert changed_slots(a, b).tolist() == [[0, 2]]


def test_loads_count_every_slot(policy: Policy):
    row = row_of(policy)
    with torch.no_grad(), policy.routing.observe() as tape:
        policy.logprobs(row)
    loads = tape.loads()
    assert loads.shape == (3, 8)
    assert loads.sum(-1).tolist() == [2 * row.token_count] * 3
    assert loads[1, 5] == (tape.own()[:, 1] == 5).sum()


def test_loading_with_checkpointing_hands_the_tape_over():
    policy = load.load_policy(
        "embedded:sort", load.InternalModelConfig(activation_checkpointing=True)
    )
    policy.lm.train()
    row = row_of(policy)
    routes = (own_routes(policy, row) + 1) % 8
    _, one, _ = passed(policy, row, routes)
    policy.lm.eval()
    _, two, _ = passed(policy, row, routes)
    assert_same(one, two)
