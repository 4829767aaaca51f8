"""Log-ratios and ratios: of tokens, of sequences, and of the mixtures between; and k3.

d_t = log pi_theta(y_t) - log pi_old(y_t) for the sampled tokens, and for sequence i of L_i tokens
l_i = (1/L_i) sum_t d_t (GSPO, arXiv 2507.18071, equation 7: s_i = exp(l_i)).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

Level = Literal["token", "sequence", "sequence_token", "average", "geometric_average"]

PerToken = Float[Tensor, " T"]
PerSequence = Float[Tensor, " S"]
TokenMask = Bool[Tensor, " T"]

MAX_LOG_RATIO = 40.0
"""Log-ratios above this count as this, with zero gradient. The paper's min() leaves s_i unbounded
if the advantage is negative; at 40 the square of s_i still fits in float32, so neither the
gradient nor its norm overflows."""


@dataclass(frozen=True)
class Segments:
    """Which of S sequences each of T tokens belongs to, in any order, and sums over sequences.

    Attributes:
        ids: sequence of each token, in 0..count-1. Padding may hold any id in that range.
        count: number of sequences, S.
        ratio_mask: tokens that were sampled. They give the length L_i and the log-ratio l_i.
        loss_mask: tokens that are trained on, a subset of `ratio_mask`.

    Three tokens, two sequences (of 2 and 1 tokens):

    >>> ids = torch.tensor([0, 0, 1])
    >>> sampled = torch.ones(3, dtype=torch.bool)
    >>> Segments(ids, 2, sampled, sampled).mean(torch.tensor([1.0, 3.0, 5.0])).tolist()
    [2.0, 5.0]
    """

    ids: Int[Tensor, " T"]
    count: int
    ratio_mask: TokenMask
    loss_mask: TokenMask

    @cached_property
    def lengths(self) -> PerSequence:
        """L_i: sampled tokens of each sequence."""
        return self.sum(self.ratio_mask.float())

    def sum(self, values: PerToken) -> PerSequence:
        """Sum per sequence, accumulated in float64 if the device has it; result in their dtype."""
        wide = torch.float32 if values.device.type == "mps" else torch.float64
        total = torch.zeros(self.count, dtype=wide, device=values.device)
        return total.index_add(0, self.ids, values.to(wide)).to(values.dtype)

    def mean(self, values: PerToken) -> PerSequence:
        """Sum per sequence over L_i. A sequence without tokens gets 0."""
        return self.sum(values) / self.lengths.clamp(min=1.0).to(values.dtype)

    def spread(self, values: Shaped[Tensor, " S"]) -> Shaped[Tensor, " T"]:
        """The sequence's value at each of its tokens."""
        return values[self.ids]


def token_log_ratio(logprobs: PerToken, old_logprobs: PerToken, mask: TokenMask) -> PerToken:
    """d_t if `mask` is set, else 0: NaN and infinities outside the mask never leak.

    >>> mask = torch.tensor([True, True, False])
    >>> new, old = torch.tensor([-1.0, -1.5, float("nan")]), torch.tensor([-1.0, -1.0, 0.0])
    >>> token_log_ratio(new, old, mask).tolist()
    [0.0, -0.5, 0.0]
    """
    # Masked before the difference: the gradient of where() is 0 there, and 0 * NaN never happens.
    return torch.where(mask, logprobs, 0.0) - torch.where(mask, old_logprobs, 0.0)


def sequence_log_ratio(d: PerToken, segments: Segments) -> PerSequence:
    """l_i, the mean of d_t over the sampled tokens (GSPO, equation 7).

    Only tokens of `loss_mask` carry gradient; all sampled tokens count in the value.

    >>> sampled = torch.ones(3, dtype=torch.bool)
    >>> segments = Segments(torch.tensor([0, 0, 0]), 1, sampled, sampled)
    >>> sequence_log_ratio(torch.tensor([0.3, -0.6, 0.0]), segments).tolist()
    [-0.10000000149011612]
    """
    return segments.mean(torch.where(segments.loss_mask, d, d.detach()))


def bounded_exp(log_ratio: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """exp(min(x, MAX_LOG_RATIO)), with zero gradient beyond the bound."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def importance_ratio(level: Level, d: PerToken, segments: Segments) -> Float[Tensor, " N"]:
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
    return bounded_exp((d + segments.spread(sequence)) / 2)


def is_extreme(
    exponent: str, d: PerToken, log_ratio: PerSequence, segments: Segments
) -> Bool[Tensor, " S"]:
    """Sequences in which an exponent that the objective uses lies beyond ±MAX_LOG_RATIO.

    Args:
        exponent: what is exponentiated: a level, `sum` (of a sequence's d_t), or `none`.
        d: d_t, without gradient.
        log_ratio: l_i.
    """
    sequence = log_ratio.abs() > MAX_LOG_RATIO
    if exponent in ("sequence", "sequence_token"):
        return sequence
    if exponent == "none":
        return torch.zeros_like(sequence)
    if exponent == "sum":
        return segments.sum(d).abs() > MAX_LOG_RATIO
    if exponent == "geometric_average":
        d = (d + segments.spread(log_ratio)) / 2
    token = segments.sum((d.abs() > MAX_LOG_RATIO).float()) > 0
    return token | sequence if exponent == "average" else token


def k3(logprobs: PerToken, reference: PerToken, mask: TokenMask) -> PerToken:
    """exp(q) - q - 1 with q = log pi_ref - log pi_theta; never negative, 0 outside the mask.

    The estimator "k3" of Schulman, "Approximating KL divergence" (2020), used by GRPO
    (arXiv 2402.03300, equation 4).

    >>> mask = torch.tensor([True, True, False])
    >>> new, ref = torch.tensor([-1.0, -1.0, 0.0]), torch.tensor([-1.0, -2.0, 0.0])
    >>> [round(v, 4) for v in k3(new, ref, mask).tolist()]
    [0.0, 0.3679, 0.0]
    """
    q = token_log_ratio(reference, logprobs, mask)
    # expm1: at q = 1e-4 the plain difference would be nothing but rounding.
    return torch.expm1(q.clamp(max=MAX_LOG_RATIO)) - q
