"""Advantages of a group of completions to one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

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


def turn_advantages(
    kind: AdvantageKind,
    turn_rewards: Sequence[Sequence[float]],
    group_ids: Int[Tensor, " S"],
    outcomes: Float[Tensor, " S"],
    weight: float,
    discount: float,
) -> list[list[float]]:
    """A_ik = A_i + weight T_ik for turn k of trajectory i: how it ended, and what the turn did.

    g_ik = Σ_{j >= k} discount^(j - k) r_ij is what the trajectory earned from turn k on. T_ik is
    made of it as A_i is of rewards (`advantages`), but compares the k-th turns of a group: those
    that stand alone, or earned the same, have T_ik = 0. It is the sum of two advantages of GiGPO
    (arXiv 2505.10978), whose groups are turns in the same state; here, of the same number.

    Args:
        kind: of the preset.
        turn_rewards: r_ik of each trajectory's turns.
        group_ids: group of each trajectory.
        outcomes: A_i.
        weight, discount: of the turns.

    Raises:
        ValueError: a reward is NaN or infinite.

    Two trajectories that end alike; the first earned it one turn earlier:

    >>> groups, outcomes = torch.zeros(2, dtype=torch.long), torch.tensor([0.0, 0.0])
    >>> turn_advantages("group_std", [[1.0, 0.0], [0.0, 1.0]], groups, outcomes, 1.0, 0.95)
    [[1.0, -1.0], [-1.0, 1.0]]
    """
    returns: list[float] = []
    places: list[int] = []
    most = max(map(len, turn_rewards), default=0)
    for rewards, group in zip(turn_rewards, group_ids.tolist(), strict=True):
        later = list(accumulate(reversed(rewards), lambda total, r: r + discount * total))
        returns += reversed(later)
        places += range(group * most, group * most + len(rewards))
    of_turns = torch.tensor(returns, dtype=torch.float64)
    gains = iter(advantages(kind, of_turns, torch.tensor(places, dtype=torch.long)).tolist())
    return [
        [outcome + weight * next(gains) for _ in rewards]
        for rewards, outcome in zip(turn_rewards, outcomes.tolist(), strict=True)
    ]


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
