"""Importance log-ratios: of tokens, of sequences, and of the mixtures between.

d_t = log pi_theta(y_t) - log pi_old(y_t) for the sampled tokens, and for sequence i of L_i tokens
l_i = (1/L_i) sum_t d_t (GSPO, arXiv 2507.18071, equation 7: s_i = exp(l_i)).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .segments import Segments

Level = Literal["token", "sequence", "sequence_token", "average", "geometric_average"]

MAX_LOG_RATIO = 40.0
"""Log-ratios above this count as this, with zero gradient. The paper's min() leaves s_i unbounded
where the advantage is negative; at 40 the square of s_i still fits in float32, so neither the
gradient nor its norm overflows."""


def token_log_ratio(
    logprobs: Float[Tensor, " T"], old_logprobs: Float[Tensor, " T"], mask: Bool[Tensor, " T"]
) -> Float[Tensor, " T"]:
    """d_t where `mask` is set, 0 elsewhere: NaN and infinities outside the mask never leak.

    >>> mask = torch.tensor([True, True, False])
    >>> new, old = torch.tensor([-1.0, -1.5, float("nan")]), torch.tensor([-1.0, -1.0, 0.0])
    >>> token_log_ratio(new, old, mask).tolist()
    [0.0, -0.5, 0.0]
    """
    # Masked before the difference: the gradient of where() is 0 there, and 0 * NaN never happens.
    return torch.where(mask, logprobs, 0.0) - torch.where(mask, old_logprobs, 0.0)


def sequence_log_ratio(d: Float[Tensor, " T"], segments: Segments) -> Float[Tensor, " S"]:
    """l_i, the mean of d_t over the sampled tokens (GSPO equation 7).

    Only tokens of `loss_mask` carry gradient; every sampled token counts in the value.

    >>> every = torch.ones(3, dtype=torch.bool)
    >>> segments = Segments(torch.tensor([0, 0, 0]), 1, every, every)
    >>> sequence_log_ratio(torch.tensor([0.3, -0.6, 0.0]), segments).tolist()
    [-0.10000000149011612]
    """
    return segments.mean(torch.where(segments.loss_mask, d, d.detach()))


def bounded_exp(log_ratio: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """exp(min(x, MAX_LOG_RATIO)), with zero gradient beyond the bound."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def importance_ratio(
    level: Level, d: Float[Tensor, " T"], segments: Segments
) -> Float[Tensor, " N"]:
    """The ratio that is clipped: one per sequence for `sequence`, else one per token.

    - `token`: w_t = exp(d_t) (GRPO)
    - `sequence`: s_i = exp(l_i) (GSPO, equation 7)
    - `sequence_token`: sg[s_i] * pi_theta / sg[pi_theta] (GSPO-token, equation 14)
    - `average`: (exp(d_t) + s_i) / 2, as in OpenPipe ART
    - `geometric_average`: sqrt(exp(d_t) * s_i), as in OpenPipe ART
    """
    if level == "token":
        return bounded_exp(d)
    sequence = sequence_log_ratio(d, segments)
    if level == "sequence":
        return bounded_exp(sequence)
    if level == "sequence_token":
        return bounded_exp(segments.spread(sequence.detach()) + (d - d.detach()))
    if level == "average":
        return (bounded_exp(d) + segments.spread(bounded_exp(sequence))) / 2
    if level == "geometric_average":
        return bounded_exp((d + segments.spread(sequence)) / 2)
    raise ValueError(f"unknown level {level!r}")
