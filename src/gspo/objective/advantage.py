"""Advantages of a group of completions to one prompt."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .presets import AdvantageKind


def advantages(
    kind: AdvantageKind, rewards: Float[Tensor, " S"], group_ids: Int[Tensor, " S"]
) -> Float[Tensor, " S"]:
    """A_i of a preset.

    - `group_std`: (r - mean) / std over the group (GSPO, equation 6)
    - `group_mean`: r - mean (Dr. GRPO)
    - `leave_one_out`: r - mean of the others = (r - mean) G / (G - 1) (RLOO)
    - `reward`: r itself (REINFORCE)

    Raises:
        ValueError: a reward is NaN or infinite.

    >>> rewards, groups = torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3, dtype=torch.long)
    >>> advantages("leave_one_out", rewards, groups).tolist()
    [1.0, -0.5, -0.5]
    """
    centred = group_advantages(rewards, group_ids, scale=kind == "group_std")
    if kind == "reward":
        return rewards.clone()
    if kind == "leave_one_out":
        _, dense, sizes = group_ids.unique(return_inverse=True, return_counts=True)
        size = sizes[dense].to(rewards.dtype)
        return centred * size / (size - 1).clamp(min=1)
    return centred


def group_advantages(
    rewards: Float[Tensor, " S"], group_ids: Int[Tensor, " S"], *, scale: bool = True
) -> Float[Tensor, " S"]:
    """A_i = (r_i - mean) / std over the sequences of one group (GSPO, equation 6).

    std is the population's. A group whose rewards are all equal (to within rounding) gets exactly
    0. `scale=False` only centres.

    Raises:
        ValueError: a reward is NaN or infinite.

    >>> rewards, groups = torch.tensor([1.0, 0.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1])
    >>> group_advantages(rewards, groups).tolist()
    [1.0, -1.0, 0.0, 0.0]
    """
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards must be finite")
    if rewards.numel() == 0:
        return rewards.clone()
    _, dense, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    size = sizes.double()
    power = _powers_of_two(rewards.double(), dense, len(size))
    # Squares of rewards such as 1e200 overflow, of 1e-200 underflow; powers of two round nothing.
    wide = rewards.double() / power[dense]
    mean = torch.zeros_like(size).index_add(0, dense, wide) / size
    centred = wide - mean[dense]
    std = (torch.zeros_like(size).index_add(0, dense, centred.square()) / size).sqrt()
    magnitude = (std.square() + mean.square()).sqrt()
    # Equal rewards such as 0.1 + 0.2 and 0.3 differ by rounding: that is not a signal.
    tolerance = max(1e-9, 4 * torch.finfo(rewards.dtype).eps)
    flat = (std <= tolerance * magnitude)[dense]
    tiny = torch.finfo(wide.dtype).tiny
    out = centred / std.clamp(min=tiny)[dense] if scale else centred * power[dense]
    return torch.where(flat, 0.0, out).to(rewards.dtype)


def _powers_of_two(
    rewards: Float[Tensor, " S"], dense: Int[Tensor, " S"], groups: int
) -> Float[Tensor, " G"]:
    """For each group a power of two near its largest |reward|; 1 if all rewards are 0."""
    largest = rewards.new_zeros(groups).scatter_reduce(0, dense, rewards.abs(), "amax")
    mantissa, _ = torch.frexp(largest)  # largest = mantissa * 2^n, mantissa in [0.5, 1)
    # Halved first: 2^n itself is beyond float64 if the largest reward is above 2^1023.
    power = (largest / 2 / mantissa).clamp(min=torch.finfo(rewards.dtype).tiny)
    return torch.where(largest > 0, power, 1.0)
