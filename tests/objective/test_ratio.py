"""The k3 estimator: its value, its sign and its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gspo.objective import (
    MAX_LOG_RATIO,
    PRESETS,
    Level,
    LossOutput,
    Objective,
    k3,
    policy_loss,
)
from objective.cases import LEVELS, cases, in_order, near, only, padded, run, shuffled
from objective.naive import Case
from objective.naive_presets import LOOPS, add_kl, loop
from objective.parts import Meeting
from objective.test_presets import evaluate, likely, trained_tokens

LOGPROBS = st.floats(-20, 0, width=32)
FIELDS = ("ids", "new", "old", "reference", "sampled", "trained", "token_advantages")
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


def in_parts(
    case: Case, objective: Objective, size: int, seed: int, tokens: int | None, **arguments: Any
) -> tuple[list[LossOutput], np.ndarray]:
    """The outputs of `size` threads with some of the tokens each, and the gradient by token."""
    owner = np.random.default_rng(seed).integers(0, size, len(case.ids))
    meeting, gradient = Meeting(size), np.zeros(len(case.ids))

    def work(part: int, sum_parts: Callable[[Tensor], Tensor]) -> LossOutput:
        here = np.flatnonzero(owner == part)  # none, too
        values = {name: torch.tensor(getattr(case, name)[here]) for name in FIELDS}
        new = values["new"].requires_grad_()
        out = policy_loss(
            new,
            values["old"],
            values["ids"].long(),
            torch.tensor(case.advantages) if not case.per_token else None,
            objective,
            token_advantages=values["token_advantages"] if case.per_token else None,
            ratio_mask=values["sampled"].bool(),
            loss_mask=values["trained"].bool(),
            total_tokens=tokens,
            reference_logprobs=values["reference"] if objective.kl_coef else None,
            sequence_count=case.count if case.per_token else None,
            sum_parts=sum_parts,
        )
        (out.loss / size).backward()
        assert new.grad is not None
        gradient[here] = new.grad.numpy()
        return out

    return meeting.each(work), gradient


@pytest.mark.parametrize("name", sorted(PRESETS))
@settings(max_examples=5)
@given(case=cases(max_length=30).map(likely), size=st.sampled_from([2, 4]), seed=st.integers(0, 99))
def test_parts_of_sequences_meet_in_the_loss_of_the_loop(
    name: str, case: Case, size: int, seed: int
) -> None:
    """l_i of two sums, and each other sum: loss, gradient and statistics are those of all tokens,
    whichever process has which of them."""
    value, divisor = LOOPS[name]
    tokens = max(trained_tokens(case), 1)
    expected = loop(case, value, case.count if divisor == "N" else tokens)
    assume(expected.margin > 1e-9)
    given = tokens if seed % 2 else None
    outs, gradient = in_parts(case, PRESETS[name].objective, size, seed, given)
    whole, _ = evaluate(case, PRESETS[name].objective, in_order(case))
    least = 1e-25 * (name == "vespo")
    near(gradient, expected.gradient, 1e-10 * expected.gradient_scale + least)
    for out in outs:
        near(out.loss.item(), expected.loss, 1e-10 * expected.loss_scale + least)
        assert out.clipped_tokens.tolist() == expected.clipped
        assert torch.allclose(out.log_ratio, whole.log_ratio, rtol=1e-12, atol=1e-12)
        for same in ("lengths", "loss_tokens", "extreme"):
            assert torch.equal(getattr(out, same), getattr(whole, same))


@pytest.mark.parametrize("level", [level for level in LEVELS if level != "sequence"])
@settings(max_examples=5)
@given(case=cases(max_length=30, max_scale=1.0, per_token=True), seed=st.integers(0, 99))
def test_parts_meet_with_advantages_and_kl_of_tokens(level: Level, case: Case, seed: int) -> None:
    objective = Objective(level, 0.2, 0.3, kl_coef=0.1)
    outs, gradient = in_parts(case, objective, 2, seed, None)
    whole, expected = run(case, objective, in_order(case))
    scale = np.abs(expected).max() + 1e-30
    near(gradient, expected, 1e-9 * scale)
    for out in outs:
        near(out.loss.item(), whole.loss.item(), 1e-10 * (1 + abs(whole.loss.item())))
        near(out.kl.item(), whole.kl.item(), 1e-10 * (1 + abs(whole.kl.item())))


def test_parts_need_the_number_of_sequences() -> None:
    """The largest id of a part may not be the largest of all."""
    values, ids = torch.zeros(2), torch.tensor([0, 1])
    objective = Objective("token", 0.2, 0.2)
    sums: dict[str, Any] = {"token_advantages": torch.ones(2), "sum_parts": lambda x: x}
    with pytest.raises(ValueError, match="give sequence_count"):
        policy_loss(values, values, ids, None, objective, **sums)
    out = policy_loss(values, values, ids, None, objective, sequence_count=3, **sums)
    assert out.lengths.tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match="leave it out"):
        policy_loss(values, values, ids, torch.ones(2), objective, sequence_count=2)
