"""What noise in l_i does to the clip: how much it clips by itself, and what to change.

Noise is l_i on unchanged weights: engine and trainer disagree although the policy has not moved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

TOLERATED = 0.05
"""Share of the sequences that noise may clip."""
FINE = 0.5
"""Noise up to this share of the clip range leaves room for the update itself."""

Verdict = Literal["fine", "tight", "noisy"]

# Not int8 -> bfloat16: weights of 8 bits and a scale lose less than activations of 8 bits do.
_QUIETER = {
    "int4": "int8",
    "int8": "float32",
    "bfloat16": "float16 or float32",
    "float16": "float32",
}


@dataclass(frozen=True)
class ClipNoise:
    """Noise of S sequences against a clip range.

    Attributes:
        epsilon_low, epsilon_high: the clip range.
        mean, spread: mean and standard deviation of l_i. The mean is a bias, -KL per token where
            lengths are equal: it doesn't shrink with length.
        clipped_positive: share that would be clipped had it A > 0: l_i > log(1 + epsilon_high).
        clipped_negative: share that would be clipped had it A < 0: l_i < log(1 - epsilon_low).
        epsilon_needed: the 95 % quantile of |exp(l_i) - 1|. A clip range of this on both sides
            clips at most `TOLERATED` of the sequences by noise.
    """

    epsilon_low: float
    epsilon_high: float
    mean: float
    spread: float
    clipped_positive: float
    clipped_negative: float
    epsilon_needed: float

    @property
    def share(self) -> float:
        """Noise as a multiple of the narrower side of the clip range."""
        return self.epsilon_needed / min(self.epsilon_low, self.epsilon_high)

    @property
    def verdict(self) -> Verdict:
        """Whether the clip range is wider than the noise."""
        if self.share <= FINE:
            return "fine"
        return "tight" if self.share <= 1 else "noisy"


def clip_noise(
    log_ratio: Float[Tensor, " S"], epsilon_low: float, epsilon_high: float
) -> ClipNoise:
    """Compare l_i, measured on unchanged weights, with a clip range.

    >>> noise = clip_noise(torch.tensor([0.0, 0.0, 0.0, -0.1]), 3e-4, 4e-4)
    >>> noise.clipped_positive, noise.clipped_negative, noise.verdict
    (0.0, 0.25, 'noisy')
    """
    values = log_ratio.detach().double().cpu()
    low, high = clip_band(epsilon_low, epsilon_high)
    return ClipNoise(
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        mean=values.mean().item(),
        spread=values.std(correction=0).item(),
        clipped_positive=(values > high).double().mean().item(),
        clipped_negative=(values < low).double().mean().item(),
        epsilon_needed=torch.quantile(values.expm1().abs(), 1 - TOLERATED).item(),
    )


def clip_band(epsilon_low: float, epsilon_high: float) -> tuple[float, float]:
    """The log-ratios at which clipping begins, for A < 0 and for A > 0.

    >>> clip_band(1.0, 0.0)
    (-inf, 0.0)
    """
    return (math.log1p(-epsilon_low) if epsilon_low < 1 else -math.inf), math.log1p(epsilon_high)


def advice(noise: ClipNoise, rollout_dtype: str | None = None) -> str:
    """One line: how wide the noise is, and what to change where it is too wide.

    >>> advice(clip_noise(torch.tensor([3e-6, -6e-6]), 3e-4, 4e-4))
    'noise is 0.019x of the clip range: fine'
    """
    times = f"{noise.share:.2g}" if noise.share < 100 else f"{noise.share:.0f}"
    size = f"noise is {times}x of the clip range"
    if noise.verdict == "fine":
        return f"{size}: fine"
    remedies = "; or ".join(_remedies(noise, rollout_dtype))
    if noise.verdict == "tight":
        return f"{size}: it clips little by itself but takes the update's room: {remedies}"
    return (
        f"{size} and alone would clip {noise.clipped_positive:.0%} of positive-advantage and "
        f"{noise.clipped_negative:.0%} of negative-advantage sequences: {remedies}"
    )


def _remedies(noise: ClipNoise, rollout_dtype: str | None) -> list[str]:
    """What makes the ratio quieter or the clip wider, the surest first."""
    out = []
    tight = noise.verdict == "tight"
    wanted = _rounded_up(noise.epsilon_needed / (FINE if tight else 1))
    if wanted < 1:
        out.append(f"raise epsilon to {'' if tight else 'at least '}{wanted:g}")
    trainer = "take old_logprobs='trainer' with a correction of pi_old/mu"
    if abs(noise.mean) > noise.spread:
        trainer += " (most of the noise is bias, which no length averages out)"
    out.append(trainer)
    if rollout_dtype in _QUIETER:
        out.append(f"sample in {_QUIETER[rollout_dtype]}")
    return out


def _rounded_up(value: float) -> float:
    """Up to two digits, which is more than the estimate is worth.

    >>> _rounded_up(0.01734)
    0.018
    """
    if not 0 < value < math.inf:
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return round(math.ceil(value / unit - 1e-9) * unit, 12)
