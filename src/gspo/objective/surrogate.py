"""The clipped surrogate of PPO, for ratios of any level."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def clipped_surrogate(
    ratio: Float[Tensor, " N"],
    advantage: Float[Tensor, " N"],
    epsilon_low: float | Float[Tensor, " N"],
    epsilon_high: float | Float[Tensor, " N"],
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """min(w A, clip(w, 1 - eps_low, 1 + eps_high) A), and where the clip is what acts.

    The gradient is exactly 0 where clipped and A dw elsewhere (GSPO, equation 5).

    >>> ratio, advantage = torch.tensor([1.5, 1.5, 0.5]), torch.tensor([1.0, -1.0, -1.0])
    >>> value, clipped = clipped_surrogate(ratio, advantage, 0.2, 0.2)
    >>> [round(v, 2) for v in value.tolist()], clipped.tolist()
    ([1.2, -1.5, -0.8], [True, False, True])
    """
    one = torch.ones_like(ratio)
    high, low = one + epsilon_high, one - epsilon_low
    above = (advantage > 0) & (ratio > high)
    below = (advantage < 0) & (ratio < low)
    clipped = above | below
    bound = torch.where(above, high, low)
    return torch.where(clipped, bound, ratio) * advantage, clipped
