"""Experts computed in other ways give the numbers of transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.models.auto import AutoModelForCausalLM

from gspo.kernels.exact import is_experts
from gspo.kernels.experts import pad_experts, sorted_experts
from support import embedded


def experts_of(kind: type[PreTrainedConfig], **changes: Any) -> Any:
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    lm: PreTrainedModel = AutoModelForCausalLM.from_config(kind(**sizes, **heads, **changes))
    return next(module for module in lm.modules() if is_experts(module))


KINDS = {
    "qwen3_moe": (Qwen3MoeConfig, {"num_experts": 5, "moe_intermediate_size": 24}),
    "olmoe": (OlmoeConfig, {"num_experts": 4}),
    "mixtral": (MixtralConfig, {"num_local_experts": 3, "hidden_act": "gelu"}),
    "granite": (GraniteMoeConfig, {"num_local_experts": 6}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sorted_experts_compute_the_same(kind: str):
    config, changes = KINDS[kind]
    experts = experts_of(config, **changes)
    hidden = torch.randn(11, 32, requires_grad=True)
    many = experts.num_experts
    # Expert 1 computes nothing; each token has two different ones, in any order.
    chosen = torch.stack([torch.randperm(many)[:2] for _ in range(11)])
    chosen = torch.where(chosen == 1, (chosen.sum(1, keepdim=True) - 1 + 2) % many, chosen)
    weights = torch.rand(11, 2, requires_grad=True)
    leaves = [hidden, weights, *experts.parameters()]
    expected = experts(hidden, chosen, weights)
    found = sorted_experts(experts, hidden, chosen, weights)
    upstream = torch.randn(11, 32)
    torch.testing.assert_close(found, expected)
    pairs = zip(
        torch.autograd.grad(found, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_tokens_of_half_precision_keep_weights_of_single_precision():
    """The router's weights are float32: their product with what experts give is, too."""
    config, changes = KINDS["qwen3_moe"]
    experts = experts_of(config, **changes).to(torch.bfloat16)
    hidden = torch.randn(4, 32, dtype=torch.bfloat16)
    chosen = torch.tensor([[0, 3], [3, 0], [4, 2], [1, 3]])
    weights = torch.rand(4, 2)
    found = sorted_experts(experts, hidden, chosen, weights)
    assert found.dtype == torch.bfloat16
    one_by_one = [
        sorted_experts(experts, hidden, chosen[:, k : k + 1], torch.ones(4, 1)) for k in range(2)
    ]
    sums = sum(w[:, None] * x.float() for w, x in zip(weights.T, one_by_one, strict=True))
    assert torch.equal(found, torch.as_tensor(sums).bfloat16())


@pytest.mark.parametrize("way", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_padded_experts_compute_the_same(rows: int, way: str, monkeypatch: pytest.MonkeyPatch):
    policy = embedded()
    experts: Any = next(m for m in policy.lm.modules() if is_experts(m))
    experts.config._experts_implementation = way
    torch.manual_seed(0)
    hidden = torch.randn(7, experts.hidden_dim, requires_grad=True)
    chosen = torch.stack([torch.randperm(experts.num_experts)[:2] for _ in range(7)])
    chosen[:, 0] = 3  # one has enough tokens, some have one, some none
    weights = torch.rand(7, 2, requires_grad=True)
    leaves = [hidden, weights, experts.gate_up_proj, experts.down_proj]

    def run() -> list[torch.Tensor]:
        out = experts(hidden, chosen, weights)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    expected = run()
    counts: list[int] = []
    grouped, forward = functional.grouped_mm, type(experts).forward

    def multiply(x: torch.Tensor, weight: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        counts.extend(offs.diff(prepend=offs.new_zeros(1)).tolist())
        return grouped(x, weight, offs=offs)

    def counted(self: Any, tokens: torch.Tensor, index: torch.Tensor, *rest: Any) -> Any:
        counts.extend(torch.bincount(index.flatten()).tolist())
        return forward(self, tokens, index, *rest)

    pad_experts(experts, rows)
    monkeypatch.setattr("gspo.kernels.experts.grouped_mm", multiply)
    monkeypatch.setattr(functional, "grouped_mm", multiply)
    monkeypatch.setattr(type(experts), "forward", counted)
    found = run()
    assert min(count for count in counts if count) >= (1 if rows == 1 else rows)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    counts.clear()
    with torch.no_grad():  # another order, and token 0 in place of zeros
        torch.testing.assert_close(experts(hidden, chosen, weights), expected[0])
    assert min(count for count in counts if count) >= rows
