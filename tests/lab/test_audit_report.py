"""What an audit says of noise: numbers by length, the verdict, and what to change."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gspo.lab.audit_report import clip_band, make_report, render
from gspo.lab.pictures import draw_audit
from lab.written import as_object

SETTING: dict[str, Any] = {
    "routing_agreement": None,
    "epsilon_low": 3e-4,
    "epsilon_high": 4e-4,
    "model": "m",
    "rollout_dtype": "int4",
    "task": "t",
    "prompts": 1,
    "completions": 1,
    "temperature": 1.0,
}


def report_of(
    log_ratios: np.ndarray | list[float], low: float, high: float, dtype: str = "float32"
) -> Any:
    """The report of sequences of one token each, whose l_i is their d_t."""
    values = np.array(log_ratios, dtype=np.float64)
    setting = SETTING | {"rollout_dtype": dtype, "epsilon_low": low, "epsilon_high": high}
    return as_object(make_report(list(values[:, None]), values, setting))


def normal(spread: float, mean: float = 0.0, count: int = 20_000) -> np.ndarray:
    return mean + spread * np.random.default_rng(0).standard_normal(count)


def synthetic(lengths: list[int], spread: float, bias: float = 0.0) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    d = [bias + spread * rng.standard_normal(length) for length in lengths]
    return make_report(d, np.array([own.mean() for own in d]), SETTING)


def test_buckets_are_powers_of_two():
    report = as_object(synthetic([1, 2, 3, 4, 5, 8, 9, 16, 16], 0.1))
    edges = [(b.longer_than, b.up_to, b.sequences, b.tokens) for b in report.buckets]
    assert edges == [(0, 1, 1, 1), (1, 2, 1, 2), (2, 4, 2, 7), (4, 8, 2, 13), (8, 16, 3, 41)]
    assert (report.total.sequences, report.total.tokens) == (9, 64)
    assert report.total.tokens / report.total.sequences == 64 / 9


def test_spread_falls_with_length_and_bias_does_not():
    sigma, bias = 0.1, -0.005
    report = as_object(synthetic([16] * 2000 + [64] * 2000 + [256] * 2000, sigma, bias))
    for bucket in report.buckets:
        length = bucket.up_to
        own = bucket.sequence_log_ratio
        assert own.std == pytest.approx(sigma / length**0.5, rel=0.05)
        assert own.mean == pytest.approx(bias, abs=0.002)
        assert bucket.token_log_ratio.std == pytest.approx(sigma, rel=0.02)
        assert bucket.kl == pytest.approx(-bias, abs=0.002)
    short, _, long = report.buckets
    assert short.clipped_negative < 0.7 and long.clipped_negative > 0.7
    assert report.verdict == "noisy"


def test_both_kl_estimates_agree_where_mu_sampled():
    """Tokens drawn from mu: mean of -d_t and k3 both are KL(mu || pi)."""
    rng = np.random.default_rng(0)
    mu, pi = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.3, 0.3])
    tokens = rng.choice(3, size=(4000, 50), p=mu)
    d = np.log(pi / mu)[tokens]
    report = as_object(make_report(list(d), d.mean(axis=1), SETTING))
    exact = float((mu * np.log(mu / pi)).sum())
    assert report.total.kl == pytest.approx(exact, rel=0.05)
    assert report.total.kl_k3 == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(("lengths", "spread"), [([1], 0.0), ([1, 1], 0.0), ([7], 0.1)])
def test_degenerate_noise_is_drawn_too(tmp_path: Path, lengths: list[int], spread: float):
    report = synthetic(lengths, spread)
    assert render(report)
    assert as_object(report)
    draw_audit(report, np.zeros(len(lengths)), tmp_path / "a.html")


def test_shares_by_sign_count_what_the_surrogate_clips():
    noise = report_of([-0.2, -0.11, -0.10, 0.0, 0.18, 0.19], 0.1, 0.2).total
    assert clip_band(0.1, 0.2) == pytest.approx((math.log(0.9), math.log(1.2)))  # -0.105, 0.182
    assert noise.clipped_negative == pytest.approx(2 / 6)
    assert noise.clipped_positive == pytest.approx(1 / 6)


def test_epsilon_needed_clips_a_twentieth():
    needed = report_of(normal(0.01), 3e-4, 4e-4).total.epsilon_needed
    assert needed == pytest.approx(1.96 * 0.01, rel=0.03)
    wide = report_of(normal(0.01), needed, needed)
    assert wide.total.clipped_positive + wide.total.clipped_negative == pytest.approx(
        0.05, abs=2e-3
    )
    assert wide.verdict == "tight" and wide.advice.startswith("noise is 1x of the clip range")


@pytest.mark.parametrize(
    ("spread", "verdict"), [(1e-6, "fine"), (7e-5, "fine"), (1.2e-4, "tight"), (1e-2, "noisy")]
)
def test_verdicts(spread: float, verdict: str):
    assert report_of(normal(spread), 3e-4, 4e-4).verdict == verdict


def test_advice_names_what_to_change():
    fine = report_of([3e-6, -6e-6], 3e-4, 4e-4).advice
    assert fine == "noise is 0.019x of the clip range: fine"
    tight = report_of(normal(1.2e-4), 3e-4, 4e-4).advice
    assert "it clips little by itself but takes the update's room: raise epsilon to 0.0004" in tight
    assert "sample in" not in tight
    noisy = report_of(normal(1e-2), 3e-4, 4e-4, "int4").advice
    assert "x of the clip range and alone would clip 48% of positive-advantage and 4" in noisy
    assert "% of negative-advantage sequences: raise epsilon to at least 0.02; or take" in noisy
    assert "old_logprobs='trainer'" in noisy and noisy.endswith("; or sample in int8")
    assert "bias" not in noisy


def test_the_advised_epsilon_is_wide_enough():
    values = normal(1e-2)
    wanted = 0.02
    assert f"at least {wanted:g}" in report_of(values, 3e-4, 4e-4).advice
    assert report_of(values, wanted, wanted).verdict != "noisy"


def test_a_bias_is_named_and_clips_one_sign():
    report = report_of(normal(1e-3, mean=-0.01), 3e-4, 4e-4)
    assert report.total.clipped_negative > 0.99 and report.total.clipped_positive == 0
    assert "most of the noise is bias" in report.advice


def test_noise_beyond_any_clip_range_advises_no_epsilon():
    assert "raise epsilon" not in report_of(normal(2.0), 3e-4, 4e-4).advice


def test_no_noise_at_all():
    report = report_of([0.0, 0.0, 0.0], 3e-4, 4e-4)
    assert (report.total.epsilon_needed, report.verdict) == (0, "fine")


def test_an_epsilon_of_one_never_clips_below():
    assert report_of([-50.0, 0.0], 1.0, 1.0).total.clipped_negative == 0
