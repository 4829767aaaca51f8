"""Shared prompts in the forward pass: who sees whom, on every kind of model, and its gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.nn import functional
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from data.prefixes import branching_groups
from data.test_shared_prompts import coincidences, paths, samples_of
from gspo.data.packing import Microbatch, pack
from gspo.data.sample import Sample
from gspo.dev import LoraConfig
from gspo.kernels import shared_prompt_attention
from gspo.kernels.shared_prompt_attention import SharedPromptAttention
from gspo.policy.policy import Policy
from gspo.policy.probe import choose_packing
from gspo.train.minibatches import prepare
from policy.routers import MOE, moe
from policy.test_policy import plain, tiny
from support import embedded, recompute_layers

WINDOWS = [None, 1, 2, 5, 17, 30, 1000]


def brute_force(microbatch: Microbatch, window: int | None) -> np.ndarray:
    """[T, T]: a token sees the tokens of its samples up to itself, inside the window."""
    seen = np.zeros((microbatch.token_count, microbatch.token_count), dtype=bool)
    for path in paths(microbatch):
        for i, query in enumerate(path):
            first = 0 if window is None else max(0, i - window + 1)
            seen[query, path[first : i + 1]] = True
    return seen


def by_calls(microbatch: Microbatch, window: int | None) -> np.ndarray:
    """The same from the plan; every key must be seen at most once."""
    calls = SharedPromptAttention(microbatch).within(window)
    counts = np.zeros((microbatch.token_count, microbatch.token_count), dtype=int)
    queried: list[int] = []
    for call in calls:
        tails, queries = call.queries.shape
        of_group = torch.zeros(tails, dtype=torch.long)
        for group in call.groups:
            members = group.members.flatten()
            places = slice(None) if group.places is None else group.places
            contexts = torch.arange(len(call.context))[group.contexts]
            of_group[members[places]] = contexts.repeat_interleave(group.members.shape[1])[places]
        assert not call.groups or torch.equal(of_group, call.context_of)
        keys = torch.cat([call.context[call.context_of], call.keys], dim=1).numpy()
        hidden = np.zeros((tails, queries, keys.shape[1]), dtype=bool)
        given = call.hidden if call.hidden.dtype == torch.bool else call.hidden < 0
        hidden[..., -given.shape[-1] :] = given[:, 0, :, 0].numpy()  # all see the keys before
        for n in range(tails):
            for i in range(queries):
                assert not hidden[n, i].all()  # padding too: no NaN from a softmax over nothing
                if call.padding is None or not call.padding[n, i]:
                    queried.append(int(call.queries[n, i]))
                    np.add.at(counts[queried[-1]], keys[n][~hidden[n, i]], 1)
    assert sorted(queried) == list(range(microbatch.token_count))
    assert counts.max() <= 1
    return counts > 0


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("share", [True, False])
@given(samples=coincidences())
def test_every_token_sees_its_own_sample_and_nothing_else(window, share: bool, samples):
    (microbatch,) = pack(samples, 10_000, share=share)
    assert (by_calls(microbatch, window) == brute_force(microbatch, window)).all()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("system", [0, 3, 40, 100])
def test_whole_tiles_of_a_context_are_multiplied_once(window: int | None, system: int):
    (microbatch,) = pack(samples_of(1, system=system), 10_000, share=True)
    assert (by_calls(microbatch, window) == brute_force(microbatch, window)).all()
    calls = SharedPromptAttention(microbatch).within(window)
    shared = any(len(call.context) < len(call.queries) for call in calls if call.groups)
    if window is None or window >= 30:
        assert shared == (system >= 40)


def test_long_tails_are_cut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shared_prompt_attention, "QUERIES", 16)
    (microbatch,) = pack(samples_of(1, system=100), 10_000, share=True)
    for window in WINDOWS:
        assert (by_calls(microbatch, window) == brute_force(microbatch, window)).all()


@given(samples=coincidences())
def test_a_token_is_seen_up_to_the_end_of_its_subtree(samples: list[Sample]):
    (microbatch,) = pack(samples, 10_000, share=True)
    place = np.arange(microbatch.token_count)
    until = SharedPromptAttention(microbatch).until
    seen = (place[None, :] <= place[:, None]) & (place[:, None] < until[None, :])
    assert (seen == brute_force(microbatch, None)).all()


MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "sliding": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"sliding_window": 5, "final_logit_softcapping": 4.0},
    ),
    **{name: MOE[name] for name in ("qwen3_moe", "mixtral", "gpt_oss")},
}


def model(name: str, **extra: Any) -> Policy:
    model_class, config_class, sizes = MODELS[name]
    policy = tiny(model_class, config_class, **(sizes | extra))
    choose_packing(policy)
    return policy


def of_microbatches(
    policy: Policy, microbatches: list[Microbatch]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of every sampled token in order, and the gradient of their weighted sum."""
    logprobs = torch.cat([policy.logprobs(microbatch).logprobs for microbatch in microbatches])
    old = torch.cat([microbatch.old_logprobs for microbatch in microbatches])
    (logprobs * old.to(logprobs.device)).sum().backward()
    gradient = {n: p.grad for n, p in policy.trainable.items() if p.grad is not None}
    policy.lm.zero_grad(set_to_none=True)
    return logprobs.detach(), gradient


def assert_close(one: dict[str, Tensor], two: dict[str, Tensor], scale: float = 1e-5) -> None:
    assert set(one) == set(two)
    for name, value in one.items():
        room = scale * float(two[name].abs().max())
        torch.testing.assert_close(value, two[name], atol=max(room, 1e-6), rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_shared_is_unshared_and_the_models_own(name: str):
    policy = model(name)
    assert policy.shares_prompts
    samples = samples_of()
    (shared,) = pack(samples, 10_000, share=True)
    (apart,) = pack(samples, 10_000)
    assert shared.token_count < 0.6 * apart.token_count
    logprobs, gradient = of_microbatches(policy, [shared])
    expected, wanted = of_microbatches(policy, [apart])
    torch.testing.assert_close(logprobs, expected, atol=5e-5, rtol=1e-5)
    expected = torch.cat([plain(policy, sample) for sample in samples])
    torch.testing.assert_close(logprobs, expected, atol=5e-5, rtol=1e-5)
    assert_close(gradient, wanted, 1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_checkpointing_recomputes_the_same(name: str):
    policy = model(name)
    microbatches = pack(samples_of(), 120, share=True)
    assert len(microbatches) > 1
    expected, wanted = of_microbatches(policy, microbatches)
    recompute_layers(policy)
    policy.lm.train()
    logprobs, gradient = of_microbatches(policy, microbatches)
    assert torch.equal(logprobs, expected)
    for key, value in wanted.items():
        assert torch.equal(gradient[key], value), key


def test_lora_shares_too():
    policy = embedded(lora=LoraConfig(r=2))
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    assert policy.shares_prompts
    samples = samples_of()
    logprobs, gradient = of_microbatches(policy, pack(samples, 10_000, share=True))
    expected, wanted = of_microbatches(policy, pack(samples, 10_000))
    torch.testing.assert_close(logprobs, expected, atol=5e-5, rtol=1e-5)
    assert_close(gradient, wanted, 1e-4)


def test_bfloat16_is_as_near_as_it_is_unshared():
    exact, rough = model("llama"), model("llama")
    rough.dtype = torch.bfloat16
    rough.round_weights()
    samples = samples_of()
    expected, _ = of_microbatches(exact, pack(samples, 10_000))
    apart, _ = of_microbatches(rough, pack(samples, 10_000))
    shared, _ = of_microbatches(rough, pack(samples, 10_000, share=True))
    assert (shared - expected).abs().mean() < 1.2 * (apart - expected).abs().mean()


def test_a_replayed_row_counts_its_copies():
    """Loads, and the balance, are those of the unshared microbatch."""
    policy = moe()
    samples = samples_of()
    weights = torch.rand(3, 8)
    found = []
    for share in (True, False):
        (microbatch,) = pack(samples, 10_000, share=share)
        with policy.routers.watch(balance=weights, copies=microbatch.copies) as choices:
            policy.logprobs(microbatch)
        assert isinstance(choices.balance, Tensor)
        found.append(
            (choices.loads(), choices.balance.detach(), choices.preferred()[microbatch.index])
        )
    (loads, balance, own), (loads_apart, balance_apart, own_apart) = found
    assert torch.equal(loads, loads_apart)
    assert torch.equal(own, own_apart)
    torch.testing.assert_close(balance, balance_apart, rtol=1e-5, atol=1e-4)


def test_a_shared_microbatch_is_refused_where_it_would_be_wrong():
    policy = model("llama")
    policy.packing = "single"
    (microbatch,) = pack(samples_of(), 10_000, share=True)
    with pytest.raises(ValueError, match=r"shared prompts.*single"):
        policy.logprobs(microbatch)


def test_a_model_that_looks_at_the_row_is_packed_but_does_not_share(caplog):
    """A layer that mixes in the token before, and heeds where samples start: recurrent-like."""
    policy = tiny(LlamaForCausalLM, LlamaConfig)
    inner: Any = policy.lm.model.layers[1]

    def shift(_module: Any, args: Any, kwargs: Any) -> Any:
        inside = (kwargs["position_ids"] > 0)[..., None]
        before = functional.pad(args[0], (0, 0, 1, 0))[:, :-1]
        return (args[0] + 0.5 * before * inside, *args[1:]), kwargs

    inner.register_forward_pre_hook(shift, with_kwargs=True)
    caplog.set_level("INFO", logger="gspo")
    choose_packing(policy)
    assert policy.packing == "tiles"
    assert not policy.shares_prompts
    assert caplog.text.count("prompts are computed per completion (off by") == 1


@pytest.mark.parametrize("packing", ["mask", "single"])
def test_samples_packed_by_mask_share_too(packing: Any, caplog, monkeypatch):
    from gspo.policy import probe

    monkeypatch.setattr(probe, "_ways", lambda policy: (packing,))
    policy = model("llama")
    assert policy.packing == packing
    assert policy.shares_prompts == (packing == "mask")
    assert ("prompts are computed per completion" in caplog.text) == (packing == "single")


def test_the_plan_is_made_once_for_layers_of_one_window(monkeypatch):
    made: list[int | None] = []
    original = SharedPromptAttention._groups
    monkeypatch.setattr(
        SharedPromptAttention,
        "_groups",
        lambda self, window: made.append(window) or original(self, window),
    )
    policy = model("sliding")
    made.clear()
    with torch.no_grad():
        policy.logprobs(pack(samples_of(), 10_000, share=True)[0])
    assert sorted(made, key=str) == [6, None]


def test_padding_is_bounded():
    batch = prepare(branching_groups(groups=8, size=9), context=512)
    samples = [sample for group in batch.samples for sample in group]
    for share in (True, False):
        (microbatch,) = pack(samples, 10_000, share=share)
        plan = SharedPromptAttention(microbatch)
        for group in plan._groups(None):
            for tail in group:
                waste, slack = shared_prompt_attention.WASTE, shared_prompt_attention.SLACK
                assert tail.width <= group[0].width <= max(waste * tail.width, tail.width + slack)
        assert plan.padded >= microbatch.token_count
