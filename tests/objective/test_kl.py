"""The k3 estimator: its value, its sign and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gspo.objective import MAX_LOG_RATIO, k3

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


def test_finite_for_huge_differences_and_zero_outside_the_mask() -> None:
    new = torch.tensor([-1e4, 1e4, math.nan, -math.inf], requires_grad=True)
    reference = torch.tensor([0.0, 0.0, 1.0, math.nan])
    value = k3(new, reference, torch.tensor([True, True, False, False]))
    value.sum().backward()
    assert value.tolist() == pytest.approx([math.exp(MAX_LOG_RATIO) - 1e4 - 1, 1e4 - 1, 0, 0])
    assert new.grad is not None
    assert new.grad.tolist() == [1.0, 1.0, 0.0, 0.0]
