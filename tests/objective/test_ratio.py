"""The k3 estimator: its value, its sign and its gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gspo.objective import MAX_LOG_RATIO, PRESETS, k3, policy_loss
from objective.cases import cases, in_order, near, only, padded, shuffled
from objective.naive import Case
from objective.naive_presets import LOOPS, add_kl, loop
from objective.test_presets import evaluate, likely, trained_tokens

LOGPROBS = st.floats(-20, 0, width=32)
PAIRS = st.lists(st.tuples(LOGPROBS, LOGPROBS), min_size=1, max_size=50)


def of(new: list[float], reference: list[float], dtype: torch.dtype) -> list[float]:
    mask = torch.ones(len(new), dtype=torch.bool)
    return k3(torch.tensor(new, dtype=dtype), torch.tensor(reference, dtype=dtype), mask).tolist()


@given(pairs=PAIRS)
def test_equal_to_its_formula_and_not_negative(pairs: list[tuple[float, float]]) -> None:
    new, reference = map(list, zip(*pairs, strict=True))
    expected = [math.expm1(r - n) - (r - n) for n, r in pairs]
    values = of(new, reference, torch.float64)
    assert values == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert min(values) >= -1e-15


@given(logprobs=st.lists(LOGPROBS, min_size=1))
def test_zero_where_the_policies_agree(logprobs: list[float]) -> None:
    assert of(logprobs, logprobs, torch.float32) == [0.0] * len(logprobs)


@pytest.mark.parametrize("q", [1e-5, -1e-5, 1e-4, -1e-4, 1e-3, -1e-3, 0.01, 0.3, -0.3])
def test_not_negative_and_precise_in_float32_for_small_differences(q: float) -> None:
    """A policy near its reference is where the KL term acts."""
    new = torch.zeros(1)
    q32 = torch.tensor([q], dtype=torch.float32)
    exact = math.expm1(q32.item()) - q32.item()
    value = k3(new, q32, torch.ones(1, dtype=torch.bool)).item()
    assert value >= 0
    assert value == pytest.approx(exact, rel=0.05)


def test_gradient_is_one_minus_the_ratio() -> None:
    new = torch.tensor([-1.0, -1.0, -3.0], requires_grad=True)
    reference = torch.tensor([-1.0, -2.0, -1.0])
    k3(new, reference, torch.ones(3, dtype=torch.bool)).sum().backward()
    assert new.grad is not None
    expected = [0.0, 1 - math.exp(-1), 1 - math.exp(2)]
    assert new.grad.tolist() == pytest.approx(expected, rel=1e-6)


def test_the_mean_gradient_is_that_of_kl_from_the_reference() -> None:
    """Each token weighted by its probability: all samples at once."""
    logits = torch.tensor([0.3, -1.2, 0.7, 2.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.5, 0.1, 1.5, 0.0], dtype=torch.float64).log_softmax(0)
    new = logits.log_softmax(0)
    estimate = k3(new, reference, torch.ones(4, dtype=torch.bool))
    (found,) = torch.autograd.grad((new.detach().exp() * estimate).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((reference.exp() * (reference - new)).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_finite_for_huge_differences_and_zero_outside_the_mask() -> None:
    new = torch.tensor([-1e4, 1e4, math.nan, -math.inf], requires_grad=True)
    reference = torch.tensor([0.0, 0.0, 1.0, math.nan])
    value = k3(new, reference, torch.tensor([True, True, False, False]))
    value.sum().backward()
    assert value.tolist() == pytest.approx([math.exp(MAX_LOG_RATIO) - 1e4 - 1, 1e4 - 1, 0, 0])
    assert new.grad is not None
    assert new.grad.tolist() == [1.0, 1.0, 0.0, 0.0]


# The term in the loss, beside each preset's surrogate


@pytest.mark.parametrize("name", sorted(PRESETS))
@settings(max_examples=30)
@given(
    case=cases(max_length=40, max_sequences=6).map(likely),
    coef=st.sampled_from([0.04, 2.0]),
    seed=st.integers(0, 2**16),
)
def test_it_is_reduced_as_the_surrogate_of_every_preset_is(
    name: str, case: Case, coef: float, seed: int
) -> None:
    """Packed, padded and split into microbatches: N and T are those of the whole step."""
    value, divisor = LOOPS[name]
    sequences, tokens = case.count + seed % 3, trained_tokens(case) + seed % 3
    total = sequences if divisor == "N" else max(tokens, 1)
    expected = loop(case, value, total)
    term = add_kl(expected, case, name, coef, total)
    assume(expected.margin > 1e-12)
    objective = replace(PRESETS[name].objective, kl_coef=coef)
    rng = np.random.default_rng(seed)
    splits = np.array_split(rng.permutation(case.count), rng.integers(1, case.count + 1))
    for parts, layout in (
        ([np.arange(case.count)], (in_order, shuffled, padded)[seed % 3]),
        (splits, shuffled),
    ):
        loss, kl, gradient = 0.0, 0.0, np.zeros(len(case.ids))
        for part in parts:
            some, where = only(case, part.tolist())
            order = layout(some) if layout is in_order else layout(some, rng)  # pyright: ignore[reportCallIssue]
            out, gradient[where] = evaluate(
                some, objective, order, sequences=sequences, tokens=tokens
            )
            loss += out.loss.item()
            kl += out.kl.item()
            policy = out.loss.item() - coef * out.kl.item()
            near(out.policy.item(), policy, 1e-12 * expected.loss_scale)
        near(loss, expected.loss, 1e-10 * expected.loss_scale + 1e-25)
        near(kl, term, 1e-10 * expected.loss_scale / coef + 1e-25)
        near(gradient, expected.gradient, 1e-10 * expected.gradient_scale + 1e-25)


@pytest.mark.parametrize("name", ["gspo", "grpo", "dapo", "dr_grpo"])
def test_its_weight_against_the_surrogate_is_that_of_other_trainers(name: str) -> None:
    """TRL, Liger and ms-swift add beta * k3 to each token's loss, and reduce the sum once."""
    torch.manual_seed(0)
    lengths, width, beta = torch.tensor([3, 40, 11, 7]), 40, 0.04
    mask = torch.arange(width) < lengths[:, None]
    old = -torch.rand(4, width, dtype=torch.float64)
    new = (old + 0.01 * torch.randn_like(old)).requires_grad_()
    reference = old + 0.1 * torch.randn_like(old)
    advantages = torch.tensor([1.0, -0.5, 2.0, -2.5], dtype=torch.float64)
    objective = replace(PRESETS[name].objective, kl_coef=beta)

    d = torch.where(mask, new - old, 0.0)
    w = d.exp() if name != "gspo" else (d.sum(1) / lengths).exp()[:, None].expand_as(d)
    low, high = 1 - objective.epsilon_low, 1 + objective.epsilon_high
    a = advantages[:, None]
    q = reference - new
    per_token = -torch.minimum(w * a, w.clamp(low, high) * a) + beta * (q.exp() - q - 1)
    per_token = torch.where(mask, per_token, 0.0)
    loss = {
        "gspo": (per_token.sum(1) / lengths).mean(),
        "grpo": (per_token.sum(1) / lengths).mean(),
        "dapo": per_token.sum() / lengths.sum(),
        "dr_grpo": per_token.sum() / 4,
    }[name]
    (expected,) = torch.autograd.grad(loss, new)
    out = policy_loss(
        new, old, None, advantages, objective, ratio_mask=mask, reference_logprobs=reference
    )
    (gradient,) = torch.autograd.grad(out.loss, new)
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-16)
