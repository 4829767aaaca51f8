"""Modules of fewer kernels give the numbers of transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gspo.kernels.fused import fuse, shorten
from models import model


def outputs(lm: Any) -> list[torch.Tensor]:
    tokens = torch.arange(24)[None] % 29 + 1
    lm.zero_grad()
    logits = lm(input_ids=tokens, use_cache=False).logits
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in lm.parameters())]


def changed_in(lm: torch.nn.Module) -> int:
    return sum("forward" in vars(module) for module in lm.modules())


# llama: nine norms and four gates. Cohere's norms are others, Gemma's gates and norms too. Four
# layers of experts in PhiMoE, beside nine norms in Mixtral ("jitter"), beside shared ones in Qwen3.
CHANGED = [("llama", 13), ("cohere", 4), ("gemma2", 0), ("phimoe", 4)]
CHANGED += [("jitter", 13), ("qwen3_next", 8)]


@pytest.mark.parametrize(("kind", "changed"), CHANGED)
def test_norms_and_gates_are_changed_if_they_give_the_same(kind: str, changed: int):
    lm = model(kind)
    expected = outputs(lm)
    fuse(lm)
    assert changed_in(lm) == changed
    for one, other in zip(outputs(lm), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "changed"), [("llama", 12), ("cohere", 4), ("qwen3_next", 8)])
def test_so_are_those_whose_weights_are_divided(kind: str, changed: int, group: DeviceMesh):
    """All but the last norm, which FSDP treats as a part that it calls by itself."""
    lm = model(kind)
    expected = outputs(lm)
    for layer in (*lm.model.layers, lm.model.norm, lm):
        fully_shard(layer, mesh=group)
    fuse(lm)
    assert changed_in(lm) == changed
    for one, other in zip(outputs(lm), expected, strict=True):
        whole = one.full_tensor() if isinstance(one, DTensor) else one
        torch.testing.assert_close(whole, other, atol=1e-5, rtol=1e-4)


class Exchanged(torch.nn.Module):
    """Its gate is what others call the factor."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (torch.nn.Linear(8, 8) for _ in range(3))
        self.act_fn = torch.nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


@pytest.mark.parametrize("divided", [False, True])
def test_a_gate_that_is_exchanged_with_its_factor_stays(divided: bool, group: DeviceMesh):
    layer = torch.nn.Sequential(Exchanged())
    if divided:
        fully_shard(layer, mesh=group)
    fuse(layer)
    assert changed_in(layer[0]) == 0


def test_a_trial_of_divided_experts_makes_few(group: DeviceMesh, monkeypatch: pytest.MonkeyPatch):
    """All of a large model would have no room beside it."""
    lm, made = model("qwen3_next"), []
    whole = max(p.numel() for p in lm.parameters() if p.dim() == 3)
    fully_shard(lm, mesh=group)
    real = torch.arange

    def arange(*given: Any, **options: Any) -> torch.Tensor:
        made.append(real(*given, **options))
        return made[-1]

    monkeypatch.setattr(torch, "arange", arange)
    fuse(lm)
    assert changed_in(lm) == 8 and max(map(len, made)) < whole


@pytest.mark.parametrize(("kind", "changed"), [("llama", 9), ("cohere", 0), ("gemma2", 0)])
def test_short_norms_give_the_same_bits_and_gradients(kind: str, changed: int):
    lm = model(kind)
    tokens = torch.arange(24)[None] % 29 + 1
    expected = outputs(lm)
    shorten(lm)
    assert changed_in(lm) == changed
    for one, other in zip(outputs(lm), expected, strict=True):
        assert torch.equal(one, other)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        calls: list[Any] = []
        short = torch.rms_norm
        patch.setattr(torch, "rms_norm", lambda *args: calls.append(args) or short(*args))
        assert torch.equal(lm(input_ids=tokens, use_cache=False).logits, expected[0])
        assert len(calls) == changed


@pytest.mark.parametrize("kinds", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_norms_type_is_that_of_the_product_with_its_weight(kinds: tuple[str, str]):
    lm = model("llama")
    norm = lm.model.norm.to(getattr(torch, kinds[1]))
    hidden = torch.randn(3, 32).to(getattr(torch, kinds[0]))
    expected = norm(hidden)
    fuse(norm)
    assert changed_in(norm) == 1
    assert norm(hidden).dtype == expected.dtype == torch.float32
    torch.testing.assert_close(norm(hidden), expected, atol=2e-2, rtol=2e-2)
