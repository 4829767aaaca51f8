"""Chunked log-probs against the naive way: full logits, log_softmax, autograd."""

from __future__ import annotations

import pytest
import torch

from gspo.policy.logprob import Head, token_logprobs

M, D, V = 37, 12, 53


def naive(hidden, head: Head, targets, temperatures):
    logits = hidden @ head.weight.t()
    if head.bias is not None:
        logits = logits + head.bias
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logp = (logits / temperatures[:, None]).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), entropy


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(M, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    bias = torch.randn(V, generator=generator)
    targets = torch.randint(0, V, (M,), generator=generator)
    temperatures = torch.rand(M, generator=generator) + 0.5
    return hidden, weight, bias, targets, temperatures


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 1000])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_equal_the_naive_way(inputs, chunk, softcap, with_bias):
    hidden, weight, bias, targets, temperatures = inputs
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    wide = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    coefficients = torch.linspace(-1, 1, M)

    head = Head(leaves[1], leaves[2] if with_bias else None, softcap)
    out = token_logprobs(leaves[0], head, targets, temperatures, chunk)
    (out.logprobs * coefficients).sum().backward()
    reference = Head(wide[1], wide[2] if with_bias else None, softcap)
    logp, entropy = naive(wide[0], reference, targets, temperatures.double())
    (logp * coefficients.double()).sum().backward()

    assert out.logprobs.dtype == out.entropy.dtype == torch.float32
    torch.testing.assert_close(out.logprobs, logp.float(), atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(out.entropy, entropy.float(), atol=5e-6, rtol=1e-5)
    for got, expected in zip(leaves, wide, strict=True):
        if expected.grad is None:
            assert got.grad is None
            continue
        assert got.grad is not None
        torch.testing.assert_close(got.grad, expected.grad.float(), atol=1e-5, rtol=1e-5)


def test_frozen_head_gets_no_gradient(inputs):
    hidden, weight, _, targets, temperatures = inputs
    hidden.requires_grad_()
    token_logprobs(hidden, Head(weight), targets, temperatures).logprobs.sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_logprobs_stay_float32_under_autocast(inputs):
    hidden, weight, _, targets, temperatures = inputs
    expected = token_logprobs(hidden, Head(weight), targets, temperatures)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_logprobs(hidden, Head(weight), targets, temperatures)
    assert torch.equal(got.logprobs, expected.logprobs)


def test_entropy_has_no_gradient(inputs):
    hidden, weight, _, targets, temperatures = inputs
    hidden.requires_grad_()
    assert not token_logprobs(hidden, Head(weight), targets, temperatures).entropy.requires_grad
