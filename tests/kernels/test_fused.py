"""Modules of fewer kernels give the numbers of transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gspo.kernels.fused import cast_experts, fuse, shorten
from models import model


def outputs(lm: Any) -> list[torch.Tensor]:
    tokens = torch.arange(24)[None] % 29 + 1
    lm.zero_grad()
    logits = lm(input_ids=tokens, use_cache=False).logits
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in lm.parameters())]


# llama: nine norms and four gates. Cohere's norms are others, Gemma's gates and norms too.
@pytest.mark.parametrize(("kind", "changed"), [("llama", 13), ("cohere", 4), ("gemma2", 0)])
def test_norms_and_gates_are_changed_if_they_give_the_same(kind: str, changed: int):
    lm = model(kind)
    expected = outputs(lm)
    assert fuse(lm) == changed
    for one, other in zip(outputs(lm), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "changed"), [("llama", 9), ("cohere", 0), ("gemma2", 0)])
def test_short_norms_give_the_same_bits_and_gradients(kind: str, changed: int):
    lm = model(kind)
    tokens = torch.arange(24)[None] % 29 + 1
    expected = outputs(lm)
    assert shorten(lm) == changed
    for one, other in zip(outputs(lm), expected, strict=True):
        assert torch.equal(one, other)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        calls: list[Any] = []
        short = torch.rms_norm
        patch.setattr(torch, "rms_norm", lambda *args: calls.append(args) or short(*args))
        assert torch.equal(lm(input_ids=tokens, use_cache=False).logits, expected[0])
        assert len(calls) == changed


def test_what_several_layers_take_is_cast_once():
    """The numbers are the same to the bit: only the norms', which differ by one rounding, are not
    changed here."""
    lm = model("llama")
    layer = lm.model.layers[0]
    alone = torch.nn.Module()
    alone.attention = layer.self_attn
    tokens = torch.arange(24)[None] % 29 + 1
    casts: list[torch.dtype] = []
    layer.self_attn.q_proj.register_forward_pre_hook(lambda _, args: casts.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        expected = lm(input_ids=tokens, use_cache=False).logits
        assert fuse(alone) == 0
        found = lm(input_ids=tokens, use_cache=False).logits
    assert casts == [torch.float32, torch.bfloat16]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kinds", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_norms_type_is_that_of_the_product_with_its_weight(kinds: tuple[str, str]):
    lm = model("llama")
    norm = lm.model.norm.to(getattr(torch, kinds[1]))
    hidden = torch.randn(3, 32).to(getattr(torch, kinds[0]))
    expected = norm(hidden)
    assert fuse(norm) == 1
    assert norm(hidden).dtype == expected.dtype == torch.float32
    torch.testing.assert_close(norm(hidden), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_autocast_casts_the_products_of_experts():
    cast_experts()
    a, b = torch.randn(8, 32, device="cuda"), torch.randn(2, 32, 16, device="cuda")
    ends = torch.tensor([3, 8], dtype=torch.int32, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        out = torch.nn.functional.grouped_mm(a, b, offs=ends)
    assert out.dtype == torch.bfloat16
    expected = torch.cat([a[:3] @ b[0], a[3:] @ b[1]])
    torch.testing.assert_close(out.float(), expected, atol=0.3, rtol=0.05)
