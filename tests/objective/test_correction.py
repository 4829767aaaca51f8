"""Corrections for pi_old / mu against loops over Python floats, and what each one's name says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gspo.objective import (
    BOUNDS,
    PRESETS,
    Correction,
    CorrectionKind,
    LossOutput,
    Objective,
    Segments,
    policy_loss,
)
from objective.cases import GARBAGE, cases, near
from objective.naive import BOUND, Case
from objective.naive_presets import LOOPS, One, loop

KINDS: list[CorrectionKind] = sorted(BOUNDS)
TOKEN_KINDS = [kind for kind in KINDS if kind.startswith("token")]
SEQUENCE_KINDS = [kind for kind in KINDS if not kind.startswith("token")]
# An objective with one ratio per sequence has no tokens to weigh.
WHOLE = ["gmpo", "gspo", "luspo"]
PAIRS = [(k, name) for k in TOKEN_KINDS for name in ("dapo", "dppo", "grpo", "gspo_token", "sapo")]
PAIRS += [(kind, name) for kind in SEQUENCE_KINDS for name in ["gmpo", "gspo", "grpo", "vespo"]]


def truncate(weight: float, low: float, high: float) -> float:
    return min(weight, high)


def mask(weight: float, low: float, high: float) -> float:
    return weight if low <= weight <= high else 0.0


def weigher(
    kind: CorrectionKind, low: float, high: float, edges: list[float]
) -> Callable[[One, list[float]], list[float]]:
    """The weights of a sequence's tokens. `edges`: distances to where a bound sets in."""
    rule = mask if kind.endswith("mask") else truncate

    def weight(log: float) -> float:
        ratio = math.exp(min(log, BOUND))
        edges.extend([ratio - high, ratio - low, log - BOUND])
        return rule(ratio, low, high)

    def weights(one: One, mu: list[float]) -> list[float]:
        if kind == "off_policy_sequence_mask":
            off = math.fsum(m - new for m, new in zip(mu, one.new, strict=True)) / one.length
            edges.append(off - high)
            return [0.0 if one.advantage < 0 and off > high else 1.0] * one.length
        c = [old - m for old, m in zip(one.old, mu, strict=True)]
        if kind.startswith("token"):
            return [weight(c_t) for c_t in c]
        power = 1.0 if "product" in kind else 1 / one.length
        return [weight(power * math.fsum(c))] * one.length

    return weights


def evaluate(case: Case, objective: Objective, mu: np.ndarray) -> tuple[LossOutput, np.ndarray]:
    """Output and gradient, with garbage where nothing was sampled."""
    rng = np.random.default_rng(len(mu))
    new, old, sampling = (
        torch.tensor(np.where(case.sampled, values, rng.choice(GARBAGE, len(mu))))
        for values in (case.new, case.old, mu)
    )
    out = policy_loss(
        new.requires_grad_(),
        old,
        torch.tensor(case.ids),
        torch.tensor(case.advantages),
        objective,
        ratio_mask=torch.tensor(case.sampled),
        loss_mask=torch.tensor(case.trained),
        sampling_logprobs=None if objective.correction is None else sampling,
    )
    out.loss.backward()
    assert new.grad is not None
    return out, new.grad.numpy()


@pytest.mark.parametrize(("kind", "name"), PAIRS)
@settings(max_examples=25)
@given(
    case=cases(max_length=30, max_scale=1.0),
    size=st.sampled_from([3e-4, 0.02, 0.5, 2.0, 60.0, 1e4]),
    bounds=st.sampled_from([(None, None), (0.9, 1.1), (0.5, 30.0)]),
    seed=st.integers(0, 2**16),
)
def test_every_kind_equals_the_loop(
    kind: CorrectionKind,
    name: str,
    case: Case,
    size: float,
    bounds: tuple[float | None, float | None],
    seed: int,
) -> None:
    defaults = {
        "token_truncate": (0.0, 2.0),
        "token_mask": (0.5, 5.0),
        "sequence_product_truncate": (0.0, 2.0),
        "sequence_product_mask": (0.5, 2.0),
        "sequence_geometric_truncate": (0.0, 1.001),
        "sequence_geometric_mask": (0.999, 1.001),
        "off_policy_sequence_mask": (0.0, 0.1),
    }
    low, high = (d if b is None else b for b, d in zip(bounds, defaults[kind], strict=True))
    edges: list[float] = []
    # On a grid: sums of c are then exact, and so is what a bound compares.
    mu = (
        case.old
        + np.round(np.random.default_rng(seed).normal(0, size, len(case.old)) * 2**16) / 2**16
    )
    value, divisor = LOOPS[name]
    tokens = max(int((case.sampled & case.trained).sum()), 1)
    total = case.count if divisor == "N" else tokens
    expected = loop(case, value, total, weigher(kind, low, high, edges), mu)
    assume(min([expected.margin, *map(abs, edges)], default=1.0) > 1e-12)
    objective = replace(PRESETS[name].objective, correction=Correction(kind, *bounds))
    out, gradient = evaluate(case, objective, mu)
    near(out.loss.item(), expected.loss, 1e-9 * expected.loss_scale + 1e-25)
    near(gradient, expected.gradient, 1e-9 * expected.gradient_scale + 1e-25)
    assert out.clipped_tokens.tolist() == expected.clipped


@pytest.mark.parametrize(("kind", "name"), PAIRS)
@settings(max_examples=8)
@given(case=cases(max_length=20, max_scale=0.05))
def test_equal_policies_need_no_correction(kind: CorrectionKind, name: str, case: Case) -> None:
    plain = PRESETS[name].objective
    out, gradient = evaluate(case, plain, case.old)
    same, same_gradient = evaluate(case, replace(plain, correction=Correction(kind)), case.old)
    assert same.loss.item() == pytest.approx(out.loss.item(), rel=1e-15, abs=1e-18)
    assert same_gradient == pytest.approx(gradient, rel=1e-15, abs=1e-18)


@pytest.mark.parametrize("kind", TOKEN_KINDS)
@pytest.mark.parametrize("name", WHOLE)
def test_tokens_of_a_sequence_ratio_cannot_be_weighed(kind: CorrectionKind, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{kind}.*use a sequence_"):
        replace(PRESETS[name].objective, correction=Correction(kind))


def weights_of(kind: CorrectionKind, c: torch.Tensor) -> torch.Tensor:
    sampled = torch.ones(len(c), dtype=torch.bool)
    one = Segments(torch.zeros(len(c), dtype=torch.long), 1, sampled, sampled)
    zero = torch.zeros_like(c)  # log mu - log pi_theta is c too
    return Correction(kind).weights(-c, c, zero, torch.tensor([-1.0]), one)


def test_the_product_collapses_on_long_sequences_and_the_geometric_mean_does_not() -> None:
    c = torch.full((2000,), -0.01)
    assert weights_of("sequence_product_truncate", c).item() == pytest.approx(2.06e-9, rel=1e-2)
    assert weights_of("sequence_product_mask", c).item() == 0.0
    assert weights_of("sequence_geometric_truncate", c).item() == pytest.approx(0.99005, rel=1e-5)
    assert weights_of("sequence_product_truncate", c[:10]).item() == pytest.approx(0.9048, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_weights_are_finite_and_within_the_upper_bound(
    kind: CorrectionKind, extreme: float
) -> None:
    weights = weights_of(kind, torch.full((8,), extreme))
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()
    assert (weights <= max(BOUNDS[kind][1], 1.0)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_flows_through_weights(kind: CorrectionKind) -> None:
    """Neither to pi_old and mu, nor by way of pi_theta: the off-policy mask looks at it."""
    c = torch.tensor([0.01, -0.02, 0.0], requires_grad=True)
    assert not weights_of(kind, c).requires_grad
    new = torch.tensor([-1.0, -1.1, -0.9], requires_grad=True)
    old, mu = (torch.tensor([-1.0, -1.0, v], requires_grad=True) for v in (-1.0, -0.9996))
    policy_loss(
        new,
        old,
        torch.zeros(3, dtype=torch.long),
        torch.tensor([1.0]),
        replace(PRESETS["reinforce"].objective, correction=Correction(kind)),
        sampling_logprobs=mu,
    ).loss.backward()
    assert mu.grad is None
    assert old.grad is None or not old.grad.any()
    assert new.grad is not None
    assert (new.grad != 0).all()


@pytest.mark.parametrize("name", ["gspo", "grpo"])
def test_the_off_policy_mask_drops_bad_samples_that_have_become_unlikely(name: str) -> None:
    # log mu - log pi_theta of each of four sequences of two tokens: only its mean counts
    off = torch.tensor([0.5, -0.1, 0.5, -0.1, 0.05, 0.05, -0.5, 0.1], dtype=torch.float64)
    mu = torch.full_like(off, -1.0)
    new = (mu - off).requires_grad_()
    policy_loss(
        new,
        new.detach(),  # the ratio is 1, nothing is clipped
        torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]),
        torch.tensor([-1.0, 1.0, -1.0, -1.0], dtype=torch.float64),
        replace(PRESETS[name].objective, correction=Correction("off_policy_sequence_mask")),
        sampling_logprobs=mu,
    ).loss.backward()
    assert new.grad is not None
    kept = new.grad.reshape(4, 2).ne(0).all(dim=1).tolist()
    assert kept == [False, True, True, True]
    assert new.grad[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_empty_bounds_are_refused(kind: CorrectionKind) -> None:
    for low, high in [(2.0, 1.0), (1.0, 1.0), (-0.1, 1.0), (0.5, math.nan)]:
        with pytest.raises(ValueError, match=kind):
            Correction(kind, low, high)


def test_a_correction_needs_the_sampling_log_probs() -> None:
    new, ids = torch.tensor([-1.0]), torch.tensor([0])
    corrected = replace(PRESETS["gspo"].objective, correction=Correction("sequence_geometric_mask"))
    with pytest.raises(ValueError, match="sampling_logprobs are missing"):
        policy_loss(new, new, ids, torch.tensor([1.0]), corrected)
    with pytest.raises(ValueError, match="sampling_logprobs are given"):
        policy_loss(
            new, new, ids, torch.tensor([1.0]), PRESETS["gspo"].objective, sampling_logprobs=new
        )
