"""Weights for pi_old / mu: the trainer at the start of the batch against the engine that sampled.

c_t = log pi_old(y_t) - log mu(y_t). Each name says its mathematics. `sequence_product` is
exp(Σ_t c_t), which collapses on long sequences; `sequence_geometric` is exp(mean_t c_t).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .ratio import PerSequence, PerToken, Segments, bounded_exp, token_log_ratio

CorrectionKind = Literal[
    "token_truncate",
    "token_mask",
    "sequence_product_truncate",
    "sequence_product_mask",
    "sequence_geometric_truncate",
    "sequence_geometric_mask",
    "off_policy_sequence_mask",
]

BOUNDS: Mapping[CorrectionKind, tuple[float, float]] = {
    "token_truncate": (0.0, 2.0),
    "token_mask": (0.5, 5.0),
    "sequence_product_truncate": (0.0, 2.0),
    "sequence_product_mask": (0.5, 2.0),
    "sequence_geometric_truncate": (0.0, 1.001),
    "sequence_geometric_mask": (0.999, 1.001),
    "off_policy_sequence_mask": (0.0, 0.1),
}
"""Default (low, high) of each kind. Truncation has no lower bound; the off-policy mask's high is
its delta, in nats per token."""


@dataclass(frozen=True)
class Correction:
    """A kind and its bounds.

    >>> Correction("token_truncate").high
    2.0
    """

    kind: CorrectionKind
    low: float
    high: float

    def __init__(self, kind: CorrectionKind, low: float | None = None, high: float | None = None):
        default = BOUNDS[kind]
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "low", default[0] if low is None else low)
        object.__setattr__(self, "high", default[1] if high is None else high)
        if not 0 <= self.low < self.high:
            raise ValueError(f"correction {kind}: bounds [{self.low}, {self.high}] are empty")

    @property
    def per_token(self) -> bool:
        """Whether each token has a weight; else each sequence has one."""
        return self.kind.startswith("token")

    def weights(
        self,
        logprobs: PerToken,
        old_logprobs: PerToken,
        sampling_logprobs: PerToken,
        advantages: PerSequence,
        segments: Segments,
    ) -> Float[Tensor, " N"]:
        """The weight of each token or sequence, without gradient.

        Args:
            logprobs, old_logprobs, sampling_logprobs: log pi_theta, log pi_old and log mu.
            advantages: one per sequence.
            segments: which token belongs to which sequence.
        """
        mask = segments.ratio_mask
        if self.kind == "off_policy_sequence_mask":
            # DeepSeek-V3.2, arXiv 2512.02556: drop bad samples that have become unlikely.
            moved = token_log_ratio(sampling_logprobs, logprobs.detach(), mask)
            stale = segments.mean(moved) > self.high
            return (~(stale & (advantages < 0))).to(logprobs.dtype)
        c = token_log_ratio(old_logprobs, sampling_logprobs, mask).detach()
        if self.kind.startswith("sequence_product"):
            c = segments.sum(c)
        elif self.kind.startswith("sequence_geometric"):
            c = segments.mean(c)
        weight = bounded_exp(c)
        if self.kind.endswith("truncate"):
            return weight.clamp(max=self.high)
        inside = (weight >= self.low) & (weight <= self.high)
        return torch.where(inside, weight, 0.0)
