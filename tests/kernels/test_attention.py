"""The door between transformers' layers and gspo's plans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from data.test_shared_prompts import samples_of
from gspo.data.packing import pack
from gspo.kernels.attention import packed_attention
from gspo.kernels.shared_prompt_attention import SharedPromptAttention


def inputs() -> tuple[SharedPromptAttention, torch.Tensor]:
    (microbatch,) = pack(samples_of(1)[:2], 10_000, share=True)
    plan = SharedPromptAttention(microbatch)
    return plan, torch.randn(1, 2, plan.size, 8)


@pytest.mark.parametrize("unknown", [{"position_bias": torch.ones(2)}, {"dropout": 0.1}])
def test_what_it_does_not_compute_is_refused(unknown: dict):
    plan, x = inputs()
    with pytest.raises(NotImplementedError, match=next(iter(unknown))):
        packed_attention(torch.nn.Module(), x, x, x, None, gspo_plan=plan, **unknown)
    packed_attention(torch.nn.Module(), x, x, x, None, gspo_plan=plan, position_bias=None)


def test_attention_that_is_not_causal_is_refused():
    plan, x = inputs()
    layer: Any = torch.nn.Module()
    layer.is_causal = False
    with pytest.raises(NotImplementedError, match="is causal"):
        packed_attention(layer, x, x, x, None, gspo_plan=plan)


def test_without_a_plan_it_is_sdpa():
    _, x = inputs()
    layer: Any = torch.nn.Module()
    layer.is_causal = True
    out, _ = packed_attention(layer, x, x, x, None, scaling=0.3)
    expected = functional.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.3)
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize("bent", [{"softcap": 0.5}, {"s_aux": torch.tensor([0.3, 2.0])}])
def test_soft_caps_and_sinks_are_the_same_with_a_plan_and_without(bent: dict):
    """Without one every score is computed at once, as transformers' eager attention does."""
    plan, x = inputs()
    layer: Any = torch.nn.Module()
    found, _ = packed_attention(layer, x, x, x, None, gspo_plan=plan, **bent)
    seen = torch.arange(plan.size)[:, None] < torch.from_numpy(plan.until)[None]
    seen &= torch.arange(plan.size)[None] <= torch.arange(plan.size)[:, None]
    expected, _ = packed_attention(layer, x, x, x, seen[None, None], **bent)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    plainly, _ = packed_attention(layer, x, x, x, None, gspo_plan=plan)
    assert not torch.allclose(found, plainly, atol=1e-2)
    few = x[:, :, :5]
    causal, _ = packed_attention(layer, few, few, few, None, **bent)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(causal, packed_attention(layer, few, few, few, mask, **bent)[0])
    added = torch.where(mask, 0.0, -1e9)
    torch.testing.assert_close(causal, packed_attention(layer, few, few, few, added, **bent)[0])


@pytest.mark.parametrize("width", [2, 6, 7])
def test_narrow_heads_are_widened_for_a_plan_and_keep_their_width(width: int):
    """With the scale of the width that they have."""
    plan, _ = inputs()
    x = torch.randn(3, 1, 2, plan.size, width, requires_grad=True)
    seen = torch.arange(plan.size)[:, None] < torch.from_numpy(plan.until)[None]
    seen &= torch.arange(plan.size)[None] <= torch.arange(plan.size)[:, None]
    layer: Any = torch.nn.Module()
    q, k, v = x
    found, _ = packed_attention(layer, q, k, v, None, gspo_plan=plan)
    expected, _ = packed_attention(layer, q, k, v, seen[None, None])
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients)
