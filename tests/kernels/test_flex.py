"""flex_attention over a microbatch: who sees whom, its values, and on a GPU its gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch._dynamo.testing import CompileCounter

from data.test_shared_prompts import coincidences, samples_of
from gspo.data.packing import Microbatch, pack
from gspo.kernels import flex
from gspo.kernels.attention import packed_attention
from gspo.kernels.flex import BLOCK, FlexAttention
from gspo.kernels.layer_input import LayerInput
from gspo.kernels.shared_prompt_attention import SharedPromptAttention
from gspo.policy import probe
from gspo.policy.policy import Policy
from gspo.policy.probe import choose_packing
from kernels.test_shared_prompt_attention import (
    WINDOWS,
    assert_close,
    brute_force,
    model,
    of_microbatches,
)

uncompiled = pytest.mark.filterwarnings(
    # What flex_attention does on the CPU is only for tests.
    "ignore:flex_attention called without torch.compile:UserWarning"
)


def by_mask(microbatch: Microbatch, window: int | None) -> torch.Tensor:
    """[P, P]: the mask_mod, asked for every pair."""
    plan = FlexAttention(SharedPromptAttention(microbatch))
    places = torch.arange(plan.padded)
    nothing = torch.zeros((), dtype=torch.int32)
    return plan.mask_mod(window)(nothing, nothing, places[:, None], places[None, :])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("share", [True, False])
@given(samples=coincidences())
def test_every_token_sees_its_own_sample_and_padding_itself(window, share: bool, samples):
    (microbatch,) = pack(samples, 10_000, share=share)
    found, size = by_mask(microbatch, window), microbatch.token_count
    expected = torch.eye(len(found), dtype=torch.bool)
    expected[:size, :size] = torch.from_numpy(brute_force(microbatch, window))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("window", [*WINDOWS, 200, 300])
@pytest.mark.parametrize("system", [3, 100, 400])
@pytest.mark.parametrize("share", [True, False])
def test_blocks_leave_out_nothing_that_is_seen(window, system: int, share: bool):
    (microbatch,) = pack(samples_of(3, system=system)[:6], 10_000, share=share)
    n = FlexAttention(SharedPromptAttention(microbatch)).padded // BLOCK
    seen = by_mask(microbatch, window).view(n, BLOCK, n, BLOCK)
    some, whole = FlexAttention(SharedPromptAttention(microbatch)).blocks(window)
    assert not (some & whole).any()
    assert (some | whole)[seen.any(3).any(1)].all()
    assert torch.equal(whole, seen.all(3).all(1))


def test_blocks_skip_what_is_not_seen():
    """Long unshared samples: their own triangles, and within a window a band of those."""
    samples = samples_of(1, system=400)[:6]
    (microbatch,) = pack(samples, 10_000)
    plan = FlexAttention(SharedPromptAttention(microbatch))
    n = plan.padded // BLOCK
    counts = [sum(int(x.sum()) for x in plan.blocks(window)) for window in (None, 100)]
    assert n >= 16
    assert counts[0] < 0.5 * n * (n + 1) / 2
    assert counts[1] <= 3 * n
    dense = plan.within(None).to_dense()[0, 0].bool()
    some, whole = plan.blocks(None)
    assert torch.equal(dense, some | whole)


@uncompiled
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_values_are_those_of_the_calls(window: int | None, kv_heads: int):
    """Gradients: on a GPU, below. flex_attention has no backward pass on the CPU."""
    (microbatch,) = pack(samples_of(2), 10_000, share=True)
    generator = torch.Generator().manual_seed(0)
    heads = (4, kv_heads, kv_heads)
    q, k, v = (torch.randn(1, h, microbatch.token_count, 16, generator=generator) for h in heads)
    plan = SharedPromptAttention(microbatch)
    for scaling in (None, 0.3):
        by_calls, flexible = (
            packed_attention(
                torch.nn.Module(), q, k, v, None, scaling, sliding_window=window, gspo_plan=own
            )[0]
            for own in (plan, FlexAttention(plan))
        )
        torch.testing.assert_close(flexible, by_calls, atol=1e-5, rtol=1e-5)


@uncompiled
@pytest.mark.parametrize("name", ["llama", "sliding", "gemma3", "qwen3_moe"])
def test_the_probe_proves_it_on_the_whole_model(name: str, monkeypatch: pytest.MonkeyPatch):
    def forward(policy: Policy, microbatch: Microbatch) -> tuple[torch.Tensor, bool]:
        with torch.no_grad():  # flex_attention has no gradient on a CPU
            return policy.logprobs(microbatch).logprobs, False

    monkeypatch.setattr(probe, "_ways", lambda policy: ("flex",))
    monkeypatch.setattr(probe, "_trained", forward)
    policy = model(name)
    assert (policy.packing, policy.shares_prompts) == ("flex", True)


def test_on_a_cpu_it_is_not_tried():
    assert model("llama").packing == "tiles"


def test_where_it_has_no_backward_pass_it_is_not_used(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(probe, "_ways", lambda policy: ("flex", "tiles"))
    assert model("llama").packing == "tiles"
    assert "(flex: NotImplementedError: FlexAttention does not support backward" in caplog.text


def test_microbatches_of_any_length_and_window_are_compiled_twice(monkeypatch: pytest.MonkeyPatch):
    """For the first length, and for all others; once more for each scale."""
    counter = CompileCounter()
    compiled = flex._compiled(counter)
    monkeypatch.setattr(flex, "_attend", compiled)
    torch._dynamo.reset()
    for scale, expected in ((0.3, 2), (0.5, 3), (0.7, 4)):
        for system, window, share in ((3, None, True), (200, 5, True), (200, None, False)):
            (microbatch,) = pack(samples_of(1, system=system)[:3], 10_000, share=share)
            q, k = (torch.randn(1, h, microbatch.token_count, 16) for h in (4, 2))
            given = LayerInput(0, q, k, k, scale, window)
            FlexAttention(SharedPromptAttention(microbatch)).attend(given)
        assert counter.frame_count == expected
    flex._compiled.cache_clear()


GPU = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128, "head_dim": 32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "sliding", "gemma3", "qwen3_moe"])
def test_on_a_gpu_shared_is_unshared_and_that_of_the_calls(name: str):
    policy = model(name, **GPU)
    policy.lm.to(torch.device("cuda"))  # pyright: ignore[reportArgumentType]
    choose_packing(policy)
    assert (policy.packing, policy.shares_prompts) == ("flex", True)
    samples = samples_of(3, system=300)
    shared, apart = (pack(samples, 100_000, share=share) for share in (True, False))
    found = [of_microbatches(policy, microbatches) for microbatches in (shared, apart)]
    policy.packing = "tiles"
    expected, wanted = of_microbatches(policy, apart)
    for logprobs, gradient in found:
        torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=1e-4)
        assert_close(gradient, wanted, 1e-3)
