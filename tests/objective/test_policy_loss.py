"""`policy_loss` against a loop over Python floats: loss, gradient and statistics, every level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gspo.core.metrics import Metrics
from gspo.objective import MAX_LOG_RATIO, Level, LossOutput, Objective
from objective.cases import (
    LEVELS,
    assert_matches,
    cases,
    in_order,
    near,
    only,
    padded,
    run,
    shuffled,
)
from objective.naive import BOUND, Case, naive

CLIPS = st.sampled_from([(3e-4, 4e-4), (0.2, 0.2), (0.1, 0.5), (1.0, 2.0)])
TOKEN_LEVELS = [level for level in LEVELS if level != "sequence"]
SEEDS = st.integers(0, 2**16)


def test_the_loop_uses_the_documented_bound() -> None:
    assert MAX_LOG_RATIO == BOUND


@pytest.mark.parametrize("level", LEVELS)
@given(case=cases(), clip=CLIPS, seed=SEEDS)
def test_any_layout_equals_the_loop(
    level: Level, case: Case, clip: tuple[float, float], seed: int
) -> None:
    total = case.count + seed % 3
    expected = naive(case, level, *clip, total)
    assume(expected.margin > 1e-12)
    rng = np.random.default_rng(seed)
    for layout in (in_order(case), shuffled(case, rng), padded(case, rng)):
        result = run(case, Objective(level, *clip), layout, total=total, seed=seed)
        assert_matches(*result, expected)


@pytest.mark.parametrize("level", TOKEN_LEVELS)
@given(case=cases(per_token=True, max_length=80), clip=CLIPS, seed=SEEDS)
def test_token_advantages_equal_the_loop(
    level: Level, case: Case, clip: tuple[float, float], seed: int
) -> None:
    expected = naive(case, level, *clip, case.count)
    assume(expected.margin > 1e-12)
    layout = shuffled(case, np.random.default_rng(seed))
    assert_matches(*run(case, Objective(level, *clip), layout, seed=seed), expected)


@pytest.mark.parametrize("level", LEVELS)
@given(case=cases(max_length=60), clip=CLIPS, seed=SEEDS)
def test_float32_equals_the_loop(
    level: Level, case: Case, clip: tuple[float, float], seed: int
) -> None:
    expected = naive(case, level, *clip, case.count)
    assume(expected.margin > 5e-7)
    layout = shuffled(case, np.random.default_rng(seed))
    result = run(case, Objective(level, *clip), layout, dtype=torch.float32, seed=seed)
    assert_matches(*result, expected, rtol=2e-5)


@pytest.mark.parametrize("level", LEVELS)
@given(case=cases(max_length=60), kl_coef=st.sampled_from([1e-3, 0.5]), seed=SEEDS)
def test_kl_term_equals_the_loop(level: Level, case: Case, kl_coef: float, seed: int) -> None:
    expected = naive(case, level, 0.2, 0.3, case.count, kl_coef)
    assume(expected.margin > 1e-12)
    layout = padded(case, np.random.default_rng(seed))
    result = run(case, Objective(level, 0.2, 0.3, kl_coef), layout, seed=seed)
    assert_matches(*result, expected)


@pytest.mark.parametrize("level", LEVELS)
@given(case=cases(max_sequences=8, max_length=60), seed=SEEDS)
def test_microbatches_add_up_to_the_whole(level: Level, case: Case, seed: int) -> None:
    """Loss, gradient, statistics per sequence and reduced metrics, whatever the split."""
    expected = naive(case, level, 0.2, 0.2, case.count)
    assume(expected.margin > 1e-12)
    rng = np.random.default_rng(seed)
    splits = np.array_split(rng.permutation(case.count), rng.integers(1, case.count + 1))

    loss, gradient, metrics = 0.0, np.zeros(len(case.ids)), Metrics()
    for sequences in splits:
        part, where = only(case, sequences.tolist())
        layout = shuffled(part, rng)
        out, part_gradient = run(part, Objective(level, 0.2, 0.2), layout, total=case.count)
        loss += out.loss.item()
        gradient[where] += part_gradient
        metrics.merge(reduced(out))
        assert out.log_ratio.tolist() == pytest.approx([expected.log_ratio[i] for i in sequences])
        assert out.extreme.tolist() == [expected.extreme[i] for i in sequences]
        for name in ("lengths", "loss_tokens", "clipped_tokens"):
            values = getattr(expected, name)
            assert getattr(out, name).tolist() == [values[i] for i in sequences]

    near(loss, expected.loss, 1e-10 * expected.loss_scale)
    near(gradient, expected.gradient, 1e-10 * expected.gradient_scale)
    whole, _ = run(case, Objective(level, 0.2, 0.2), in_order(case))
    assert metrics.compute() == pytest.approx(reduced(whole).compute(), rel=1e-6, abs=1e-6)
    assert metrics.compute()["clipped"] == sum(expected.clipped_tokens)
    assert metrics.compute()["extreme"] == sum(expected.extreme)


def reduced(out: LossOutput) -> Metrics:
    """A microbatch's statistics, as `gspo.core.metrics` reduces them."""
    metrics = Metrics()
    share = out.clipped_tokens / out.loss_tokens.clamp(min=1)
    metrics.mean("clip_fraction", share.sum().item(), share.numel())
    metrics.add("clipped", out.clipped_tokens.sum().item())
    metrics.add("extreme", int(out.extreme.sum()))
    metrics.maximum("longest", out.lengths.max().item())
    metrics.distribution("log_ratio", out.log_ratio.tolist())
    return metrics
