"""Chunked log-probs against the naive way: full logits, log_softmax, autograd, in float64."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from gspo.core.errors import DataError
from gspo.kernels import logprob, projection
from gspo.kernels.logprob import Head, full_logits, token_logprobs

M, D, V = 37, 12, 53


def naive(hidden, head: Head, targets, temperatures):
    logits = hidden @ head.weight.t()
    if head.bias is not None:
        logits = logits + head.bias
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logp = (logits / temperatures[:, None]).log_softmax(-1)
    entropy = -(logp.exp() * logp).nan_to_num(0.0).sum(-1)
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


def blockwise(hidden, head: Head, targets, temperatures, chunk, vocab_chunk):
    """In blocks of so many tokens x vocabulary entries; None: as many as by default."""
    entries, logits = logprob.CPU_BLOCK
    with mock.patch.object(logprob, "CPU_BLOCK", (vocab_chunk or entries, logits)):
        return token_logprobs(hidden, head, targets, temperatures, chunk)


def check(inputs, head_of, trained, coefficients, chunk=None, vocab_chunk=None):
    """Values and gradients of (hidden, weight, bias), of which `trained` says which are."""
    *_, targets, temperatures = inputs
    ours = [x.clone().requires_grad_(on) for x, on in zip(inputs, trained, strict=False)]
    wide = [x.double().requires_grad_(on) for x, on in zip(inputs, trained, strict=False)]
    out = blockwise(ours[0], head_of(*ours[1:]), targets, temperatures, chunk, vocab_chunk)
    out.logprobs.backward(coefficients)
    logp, entropy = naive(wide[0], head_of(*wide[1:]), targets, temperatures.double())
    logp.backward(coefficients.double())

    assert out.logprobs.dtype == out.entropy.dtype == torch.float32
    torch.testing.assert_close(out.logprobs, logp.float(), atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(out.entropy, entropy.float(), atol=2e-6, rtol=1e-6)
    for got, expected in zip(ours, wide, strict=True):
        if expected.grad is None:
            assert got.grad is None
            continue
        assert got.grad is not None
        torch.testing.assert_close(got.grad, expected.grad.float(), atol=1e-5, rtol=1e-5)


def heads(softcap, with_bias):
    return lambda weight, bias: Head(weight, bias if with_bias else None, softcap)


@pytest.mark.parametrize("kept", [0, 4 * M * 20, 2**30], ids=["none", "some", "all"])
@pytest.mark.parametrize("chunk, vocab_chunk", [(1, 53), (5, 10), (36, 1), (37, 52), (None, None)])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_equal_the_naive_way(
    inputs, monkeypatch, chunk, vocab_chunk, softcap, with_bias, kept
):
    monkeypatch.setattr(projection, "KEPT_BYTES", kept)
    trained = (True, True, with_bias)
    coefficients = torch.linspace(-1, 1, M)  # one of them is 0
    check(inputs, heads(softcap, with_bias), trained, coefficients, chunk, vocab_chunk)


@pytest.mark.parametrize("chunk, vocab_chunk", [(5, 10), (37, 52), (None, None)])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    "trained",
    [(True, False, False), (False, True, False), (False, False, True), (True, False, True)],
    ids=["hidden", "weight", "bias", "hidden+bias"],
)
def test_gradients_reach_just_what_is_trained(inputs, chunk, vocab_chunk, softcap, trained):
    check(inputs, heads(softcap, True), trained, torch.linspace(-1, 1, M), chunk, vocab_chunk)


@pytest.mark.parametrize("kept", [0, 2**30])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_tokens_without_gradient_are_left_out(inputs, monkeypatch, softcap, kept):
    monkeypatch.setattr(projection, "KEPT_BYTES", kept)
    coefficients = torch.linspace(-1, 1, M)
    for zeros in (slice(3, 30), slice(0, M), [0, 6, 7, 21]):
        some = coefficients.clone()
        some[zeros] = 0
        check(inputs, heads(softcap, True), (True, True, True), some, 5, 10)


@pytest.mark.parametrize("kept", [0, 2**30])
def test_a_token_without_gradient_leaks_nothing(inputs, monkeypatch, kept):
    monkeypatch.setattr(projection, "KEPT_BYTES", kept)
    hidden, weight, _, targets, temperatures = inputs
    hidden[7] = torch.nan
    weight.requires_grad_()
    out = blockwise(hidden, Head(weight), targets, temperatures, 5, 10)
    torch.where(torch.arange(M) == 7, 0.0, out.logprobs).sum().backward()
    assert out.logprobs.isnan().sum() == 1
    assert weight.grad is not None and weight.grad.isfinite().all()


@pytest.mark.parametrize("kept", [0, 2**30])
def test_a_tied_head_gets_both_gradients(monkeypatch, kept):
    monkeypatch.setattr(projection, "KEPT_BYTES", kept)
    table = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(M) % 11
    targets, temperatures = torch.arange(M) % V, torch.ones(M)
    ours, wide = table.clone().requires_grad_(), table.double().requires_grad_()
    blockwise(ours[tokens], Head(ours), targets, temperatures, 5, 10).logprobs.sum().backward()
    naive(wide[tokens], Head(wide), targets, temperatures.double())[0].sum().backward()
    assert ours.grad is not None and wide.grad is not None
    torch.testing.assert_close(ours.grad, wide.grad.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kept", [0, 2**30])
def test_the_graph_can_be_used_twice(inputs, monkeypatch, kept):
    monkeypatch.setattr(projection, "KEPT_BYTES", kept)
    hidden, weight, _, targets, temperatures = inputs
    for leaves in ([hidden.requires_grad_()], [hidden, weight.requires_grad_()]):
        out = blockwise(hidden, Head(weight, None, 3.0), targets, temperatures, 5, 10)
        once = torch.autograd.grad(out.logprobs.sum(), leaves, retain_graph=True)
        again = torch.autograd.grad(out.logprobs.sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False)])
def test_half_precision_is_summed_in_float32(inputs, dtype, trained):
    *floats, targets, temperatures = inputs
    halves = [x.to(dtype).requires_grad_(on) for x, on in zip(floats, trained, strict=True)]
    wide = [x.detach().double().requires_grad_() for x in halves]
    out = blockwise(halves[0], Head(*halves[1:]), targets, temperatures, 5, 10)
    out.logprobs.sum().backward()
    logp, entropy = naive(wide[0], Head(*wide[1:]), targets, temperatures.double())
    logp.sum().backward()
    torch.testing.assert_close(out.logprobs, logp.float(), atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(out.entropy, entropy.float(), atol=2e-6, rtol=1e-6)
    one_rounding = torch.finfo(dtype).eps / 2 + 1e-5
    for got, expected in zip(halves, wide, strict=True):
        if got.grad is not None:
            assert got.grad.dtype == dtype
            assert expected.grad is not None
            torch.testing.assert_close(
                got.grad.double(), expected.grad, atol=1e-5, rtol=one_rounding
            )


def test_many_small_gradients_of_a_bfloat16_head_add_up():
    count = 4096  # a bfloat16 sum of ones ends at 256
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    hidden, targets = torch.ones(count, 1, dtype=torch.bfloat16), torch.zeros(count).long()
    out = token_logprobs(hidden, Head(weight), targets, torch.ones(count), 16)
    out.logprobs.sum().backward()
    assert weight.grad is not None and weight.grad.flatten().tolist() == [2048.0, -2048.0]


def test_banned_entries_have_probability_zero(inputs):
    bias = inputs[2]
    bias[:23] = -torch.inf  # two whole blocks and a part of the next
    bias[40] = torch.finfo(torch.float32).min
    inputs[3].copy_(23 + torch.arange(M) % 17)
    for trained in ((True, True, True), (True, False, False)):
        check(inputs, heads(None, True), trained, torch.ones(M), 5, 10)
    inputs[3][4] = 40
    inputs[3][5] = 2
    out = blockwise(inputs[0], Head(inputs[1], bias), inputs[3], inputs[4], 5, 10)
    assert out.logprobs[5] == -torch.inf and out.logprobs[4] < -1e30
    assert out.logprobs.isfinite().sum() >= M - 2 and out.entropy.isfinite().all()


@pytest.mark.parametrize("vocab_chunk", [1, 3, 8])
@pytest.mark.parametrize("order", [1, -1])
def test_extreme_logits(vocab_chunk, order):
    logits = torch.tensor([-3e4, -200.0, -100.0, 0.0, 1.0, 80.0, 3e4, 3e4][::order])
    weight = logits[:, None].clone().requires_grad_()
    hidden = torch.ones(8, 1, requires_grad=True)
    targets, temperatures = torch.arange(8), torch.ones(8)
    out = blockwise(hidden, Head(weight), targets, temperatures, None, vocab_chunk)
    out.logprobs.sum().backward()
    wide = weight.detach().double().requires_grad_()
    logp, entropy = naive(torch.ones(8, 1).double(), Head(wide), targets, temperatures.double())
    logp.sum().backward()
    torch.testing.assert_close(out.logprobs, logp.float(), atol=1e-6, rtol=2e-7)
    torch.testing.assert_close(out.entropy, entropy.float(), atol=1e-6, rtol=0)
    assert weight.grad is not None and wide.grad is not None
    torch.testing.assert_close(weight.grad, wide.grad.float(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("gap", [5.0, 12.0, 20.0])
def test_entropy_of_an_almost_certain_token_does_not_cancel(gap):
    weight = torch.tensor([[1000.0], [1000.0 - gap], [900.0]])
    hidden, one = torch.ones(1, 1), torch.ones(1)
    out = blockwise(hidden, Head(weight), torch.zeros(1).long(), one, None, 1)
    _, entropy = naive(hidden.double(), Head(weight.double()), torch.zeros(1).long(), one.double())
    assert abs(out.entropy.item() - entropy.item()) < 1e-7  # log-sum-exp minus mean: 6e-5


@pytest.mark.parametrize("chunk", [None, 5])
def test_no_tokens(inputs, chunk):
    hidden, targets, temperatures = (inputs[i][:0] for i in (0, 3, 4))
    leaves = [hidden.requires_grad_(), inputs[1].requires_grad_(), inputs[2].requires_grad_()]
    out = token_logprobs(hidden, Head(*leaves[1:]), targets, temperatures, chunk)
    out.logprobs.sum().backward()
    assert out.logprobs.shape == out.entropy.shape == (0,)
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("wrong", [-100, -1, V])
def test_a_target_outside_the_vocabulary_is_refused(inputs, wrong):
    hidden, weight, _, targets, temperatures = inputs
    targets[3] = wrong
    with pytest.raises(DataError, match=f"{wrong} is not among the {V} entries"):
        token_logprobs(hidden, Head(weight), targets, temperatures)


def test_frozen_head_gets_no_gradient(inputs):
    hidden, weight, _, targets, temperatures = inputs
    hidden.requires_grad_()
    token_logprobs(hidden, Head(weight), targets, temperatures).logprobs.sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_entropy_has_no_gradient(inputs):
    hidden, weight, _, targets, temperatures = inputs
    hidden.requires_grad_()
    assert not token_logprobs(hidden, Head(weight), targets, temperatures).entropy.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_full_logits_are_the_same_in_parts(inputs, monkeypatch, dtype, softcap):
    hidden, weight, bias = (x.to(dtype) for x in inputs[:3])
    whole = full_logits(hidden, Head(weight, bias, softcap))
    monkeypatch.setattr(logprob, "CPU_BLOCK", (10, 100))
    expected = hidden.double() @ weight.double().t() + bias
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    for got in (whole, full_logits(hidden, Head(weight, bias, softcap))):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected.float(), atol=1e-5, rtol=1e-5)
