"""KL(pi_theta || pi_ref), estimated from sampled tokens."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .ratio import MAX_LOG_RATIO, token_log_ratio


def k3(
    logprobs: Float[Tensor, " T"], reference: Float[Tensor, " T"], mask: Bool[Tensor, " T"]
) -> Float[Tensor, " T"]:
    """exp(q) - q - 1 with q = log pi_ref - log pi_theta; never negative, 0 outside the mask.

    The estimator "k3" of Schulman, "Approximating KL divergence" (2020), used by GRPO
    (arXiv 2402.03300, equation 4).

    >>> mask = torch.tensor([True, True, False])
    >>> new, ref = torch.tensor([-1.0, -1.0, 0.0]), torch.tensor([-1.0, -2.0, 0.0])
    >>> [round(v, 4) for v in k3(new, ref, mask).tolist()]
    [0.0, 0.3679, 0.0]
    """
    q = token_log_ratio(reference, logprobs, mask)
    # expm1: at q = 1e-4 the plain difference would be rounding alone.
    return torch.expm1(q.clamp(max=MAX_LOG_RATIO)) - q
