"""Advantages of a group of completions to one prompt."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


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
    wide = rewards.double()
    _, dense = group_ids.unique(return_inverse=True)
    groups = int(dense.max()) + 1
    size = torch.zeros(groups, dtype=wide.dtype, device=wide.device).index_add(
        0, dense, torch.ones_like(wide)
    )
    mean = torch.zeros_like(size).index_add(0, dense, wide) / size
    centred = wide - mean[dense]
    std = (torch.zeros_like(size).index_add(0, dense, centred.square()) / size).sqrt()
    magnitude = (std.square() + mean.square()).sqrt()
    # Equal rewards such as 0.1 + 0.2 and 0.3 differ by rounding: that is not a signal.
    tolerance = max(1e-9, 4 * torch.finfo(rewards.dtype).eps)
    flat = (std <= tolerance * magnitude)[dense]
    scaled = centred / std.clamp(min=torch.finfo(wide.dtype).tiny)[dense] if scale else centred
    return torch.where(flat, 0.0, scaled).to(rewards.dtype)
