"""Noise in l_i against the clip range."""

from __future__ import annotations

import math

import pytest
import torch

from gspo.lab.noise import advice, clip_band, clip_noise


def normal(spread: float, mean: float = 0.0, count: int = 20_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return mean + spread * torch.randn(count, generator=generator)


def test_shares_by_sign_count_what_the_surrogate_clips():
    values = torch.tensor([-0.2, -0.11, -0.10, 0.0, 0.18, 0.19])
    noise = clip_noise(values, epsilon_low=0.1, epsilon_high=0.2)
    assert clip_band(0.1, 0.2) == pytest.approx((math.log(0.9), math.log(1.2)))  # -0.105, 0.182
    assert noise.clipped_negative == pytest.approx(2 / 6)
    assert noise.clipped_positive == pytest.approx(1 / 6)


def test_epsilon_needed_clips_a_twentieth():
    noise = clip_noise(normal(0.01), 3e-4, 4e-4)
    assert noise.epsilon_needed == pytest.approx(1.96 * 0.01, rel=0.03)
    wide = clip_noise(normal(0.01), noise.epsilon_needed, noise.epsilon_needed)
    assert wide.clipped_positive + wide.clipped_negative == pytest.approx(0.05, abs=2e-3)
    assert wide.share == 1 and wide.verdict == "tight"


@pytest.mark.parametrize(
    ("spread", "verdict"), [(1e-6, "fine"), (7e-5, "fine"), (1.2e-4, "tight"), (1e-2, "noisy")]
)
def test_verdicts(spread: float, verdict: str):
    assert clip_noise(normal(spread), 3e-4, 4e-4).verdict == verdict


def test_advice_names_what_to_change():
    assert (
        advice(clip_noise(normal(1e-6), 3e-4, 4e-4)) == "noise is 0.0066x of the clip range: fine"
    )
    tight = advice(clip_noise(normal(1.2e-4), 3e-4, 4e-4), "float32")
    assert "raise epsilon to 0.00048" in tight and "sample in" not in tight
    noisy = advice(clip_noise(normal(1e-2), 3e-4, 4e-4), "int4")
    assert "48% of positive-advantage and 49% of negative-advantage" in noisy
    assert "raise epsilon to at least 0.02" in noisy
    assert "old_logprobs='trainer'" in noisy and "sample in int8" in noisy
    assert "bias" not in noisy


def test_the_advised_epsilon_is_wide_enough():
    values = normal(1e-2)
    wanted = 0.02
    assert f"at least {wanted:g}" in advice(clip_noise(values, 3e-4, 4e-4))
    assert clip_noise(values, wanted, wanted).verdict != "noisy"


def test_a_bias_is_named_and_clips_one_sign():
    noise = clip_noise(normal(1e-3, mean=-0.01), 3e-4, 4e-4)
    assert noise.clipped_negative > 0.99 and noise.clipped_positive == 0
    assert "most of the noise is bias" in advice(noise)


def test_noise_beyond_any_clip_range_advises_no_epsilon():
    assert "raise epsilon" not in advice(clip_noise(normal(2.0), 3e-4, 4e-4))


def test_no_noise_at_all():
    noise = clip_noise(torch.zeros(3), 3e-4, 4e-4)
    assert (noise.share, noise.verdict) == (0, "fine")


def test_an_epsilon_of_one_never_clips_below():
    assert clip_noise(torch.tensor([-50.0, 0.0]), 1.0, 1.0).clipped_negative == 0
