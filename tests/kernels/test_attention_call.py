"""The attention of a microbatch and its gradient, against a dense mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from data.test_shared_prompts import samples_of
from gspo.data.packing import pack
from gspo.kernels.attention import packed_attention
from gspo.kernels.shared_prompt_attention import SharedPromptAttention
from kernels.test_shared_prompt_attention import brute_force


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_and_its_gradient_are_those_of_a_dense_mask(window, kv_heads: int):
    (microbatch,) = pack(samples_of(2), 10_000, share=True)
    generator = torch.Generator().manual_seed(0)
    size = microbatch.token_count
    heads = (4, kv_heads, kv_heads)
    inputs = [torch.randn(1, h, size, 8, generator=generator, dtype=torch.double) for h in heads]
    weight = torch.randn(size, 4, 8, generator=generator, dtype=torch.double)

    def result(dense: bool) -> list[Tensor]:
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        if dense:
            mask = torch.from_numpy(brute_force(microbatch, window))
            k4, v4 = (x.repeat_interleave(4 // kv_heads, 1) for x in (k, v))
            out = functional.scaled_dot_product_attention(q, k4, v4, mask, scale=0.3)
            out = out.transpose(1, 2)
        else:
            plan = SharedPromptAttention(microbatch)
            out, _ = packed_attention(
                torch.nn.Module(), q, k, v, None, 0.3, sliding_window=window, gspo_plan=plan
            )
        (out[0] * weight).sum().backward()
        return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]

    for one, two in zip(result(False), result(True), strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-12)
