"""Log-probs of split products, against those of float32 and float64."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gspo.kernels import logprob
from gspo.kernels.logprob import Head, full_logits, token_logprobs
from gspo.kernels.split_projection import split_product

CLIP = 3e-4
M, D, V = 37, 16, 101


def leaves(seed: int = 0, *, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(M, D, generator=rng)
    weight = torch.randn(V, D, generator=rng) * (spread / D**0.5)
    return hidden, weight, torch.randn(V, generator=rng)


def score(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, **head: Any):
    """Log-probs, and the gradients of what is trained; in small blocks."""
    trained = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    blocks = mock.patch.multiple(logprob, SPLIT_BLOCK=(32, 320), CPU_BLOCK=(32, 320))
    temperatures, up = torch.linspace(0.5, 2, M), torch.cos(torch.arange(M) * 1.0)
    with blocks:
        out = token_logprobs(hidden, Head(weight, bias, **head), targets, temperatures)
    gradients = torch.autograd.grad(out.logprobs, trained, up) if trained else ()
    return out.logprobs.detach(), out.entropy, gradients


def assert_close(one: Tensor, other: Tensor, share: float) -> None:
    assert (one - other).norm() <= share * other.norm()


@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "scale": 0.5, "entries": V - 5}])
@pytest.mark.parametrize("trained", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 0)])
def test_they_are_those_of_float32_products(head: dict[str, Any], trained: tuple[int, ...]):
    """Gradients are off by what rounding to bfloat16 costs, 2^-9 of each factor."""
    given = [x.requires_grad_(bool(on)) for x, on in zip(leaves(), trained, strict=True)]
    targets = torch.arange(M) * 2 % (V - 5)
    one, other = (score(*given, targets, split=split, **head) for split in (True, False))
    assert (one[0] - other[0]).abs().max() < CLIP / 3
    torch.testing.assert_close(one[1], other[1], atol=CLIP / 3, rtol=0)
    for found, expected in zip(one[2], other[2], strict=True):
        assert found.dtype == expected.dtype
        assert_close(found, expected, 2**-7)


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([0.1, 2.0]))
def test_a_sequence_is_off_by_far_less_than_the_clip_range(seed: int, spread: float):
    hidden, weight, bias = leaves(seed, spread=spread)
    targets = torch.arange(M)
    found, _, _ = score(hidden, weight, bias, targets, split=True)
    logits = hidden.double() @ weight.double().t() + bias
    exact = (logits / torch.linspace(0.5, 2, M)[:, None]).log_softmax(-1)
    error = found - exact.gather(1, targets[:, None])[:, 0]
    assert error.mean().abs() < CLIP / 10
    assert error.abs().max() < CLIP


def test_near_certain_tokens_keep_their_gradient():
    """1 - probability, in which a rounded probability would leave nothing. Logits of 40, of 16 terms
    each, are rounded more coarsely than those of a model."""
    _, weight, _ = leaves()
    targets = torch.arange(M)
    hidden = (40 * weight[targets] / weight[targets].square().sum(-1, keepdim=True)).detach()
    given = hidden.requires_grad_(), weight.requires_grad_()
    one, other = (score(*given, None, targets, split=split) for split in (True, False))
    assert other[0].median() > -1e-3
    for found, expected in zip(one[2], other[2], strict=True):
        assert_close(found, expected, 2**-4)


@pytest.mark.parametrize("kinds", [(16, 16), (32, 16), (16, 32), (32, 32)])
def test_what_is_bfloat16_already_loses_nothing(kinds: tuple[int, int]):
    types = {16: torch.bfloat16, 32: torch.float32}
    hidden, weight, _ = leaves()
    hidden, weight = hidden.to(types[kinds[0]]), weight.to(types[kinds[1]])
    exact = hidden.double() @ weight.double().t()
    size = hidden.double().abs() @ weight.double().abs().t()
    off = ((split_product(hidden, weight) - exact).abs() / size).max()
    assert off < (2**-22 if kinds == (16, 16) else 2**-15)
    full = full_logits(hidden, Head(weight, split=True, softcap=3.0))
    torch.testing.assert_close(full, 3 * (exact / 3).tanh().float(), atol=1e-4, rtol=0)
