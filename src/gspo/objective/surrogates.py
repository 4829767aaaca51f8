"""What is done with ratio and advantage: one function per surrogate.

Each returns the value v_i of each sequence, which the loss adds up, and which tokens the range
acts on: it silences them (zero gradient), or bounds their weight (`truncate`). `a` is the advantage
at each token, 0 outside the mask.

>>> sorted(SURROGATES)
['clip', 'divergence', 'gamma', 'gate', 'geometric', 'likelihood', 'truncate']
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .presets import Objective, Surrogate
from .ratio import MAX_LOG_RATIO, bounded_exp, importance_ratio
from .segments import Segments
from .surrogate import clipped_surrogate


@dataclass(frozen=True)
class Terms:
    """Tokens T of S sequences, masked: nothing outside `segments.ratio_mask` is other than 0.

    Attributes:
        d: log pi_theta - log pi_old, with gradient.
        logprobs: log pi_theta, with gradient.
        old: log pi_old.
        a: advantage of each token.
        advantages: of each sequence, or None where they are given per token.
        weights: correction of each token, or None.
    """

    d: Float[Tensor, " T"]
    logprobs: Float[Tensor, " T"]
    old: Float[Tensor, " T"]
    a: Float[Tensor, " T"]
    advantages: Float[Tensor, " S"] | None
    segments: Segments
    weights: Float[Tensor, " T"] | None = None

    def mean(self, values: Float[Tensor, " T"]) -> Float[Tensor, " S"]:
        """(1/L_i) Σ_t over the trained tokens, corrected."""
        if self.weights is not None:
            values = values * self.weights
        return self.segments.mean(torch.where(self.segments.loss_mask, values, 0.0))


Result = tuple[Float[Tensor, " S"], Bool[Tensor, " T"]]


def clip(terms: Terms, objective: Objective) -> Result:
    """min(w A, clip(w) A); w is what the objective's level makes it."""
    segments = terms.segments
    ratio = importance_ratio(objective.level, terms.d, segments)
    low, high = _range(terms, objective)
    if objective.level != "sequence":
        value, clipped = clipped_surrogate(ratio, terms.a, low, high)
        return terms.mean(value), clipped
    assert terms.advantages is not None
    value, clipped = clipped_surrogate(ratio, terms.advantages, low, high)
    return torch.where(segments.lengths > 0, value, 0.0), segments.spread(clipped)


def _range(
    terms: Terms, objective: Objective
) -> tuple[Float[Tensor, ...] | float, Float[Tensor, ...] | float]:
    """epsilon_low and epsilon_high, of each sequence or token where they depend on its length."""
    low, high = objective.epsilon_low, objective.epsilon_high
    if objective.epsilon_scale == "constant":
        return low, high
    scale = terms.segments.lengths.to(terms.d.dtype).clamp(min=1).rsqrt()
    if objective.level != "sequence":
        scale = terms.segments.spread(scale)
    return low * scale, high * scale


def geometric(terms: Terms, objective: Objective) -> Result:
    """GMPO: A_i exp(mean_t of d_t, clipped in log space on the side that A_i pushes to)."""
    assert terms.advantages is not None
    # Every sampled token is in the mean, trained on or not, and clipped alike.
    side = terms.segments.spread(terms.advantages)
    above = (side > 0) & (terms.d > objective.epsilon_high)
    below = (side < 0) & (terms.d < -objective.epsilon_low)
    bound = _either(above, objective.epsilon_high, -objective.epsilon_low, terms.d)
    clipped = above | below
    kept = torch.where(clipped, bound, terms.d)
    kept = torch.where(terms.segments.loss_mask, kept, kept.detach())
    value = bounded_exp(terms.segments.mean(kept)) * terms.advantages
    return torch.where(terms.segments.lengths > 0, value, 0.0), clipped


def truncate(terms: Terms, objective: Objective) -> Result:
    """CISPO: sg[clamp(w, 1 - eps_low, 1 + eps_high)] A log pi. No token loses its gradient."""
    ratio = bounded_exp(terms.d.detach())
    weight = ratio.clamp(1 - objective.epsilon_low, 1 + objective.epsilon_high)
    truncated = (weight != ratio) & (terms.a != 0)
    return terms.mean(weight * terms.a * terms.logprobs), truncated


def gate(terms: Terms, objective: Objective) -> Result:
    """SAPO: (4 / tau) sigmoid(tau (w - 1)) A, whose gradient gate is 1 at w = 1."""
    constants = objective.constants
    tau = _either(terms.a > 0, constants["tau_pos"], constants["tau_neg"], terms.d)
    value = torch.sigmoid(tau * (bounded_exp(terms.d) - 1)) * 4 / tau
    return terms.mean(value * terms.a), torch.zeros_like(terms.a, dtype=torch.bool)


def gamma(terms: Terms, objective: Objective) -> Result:
    """VESPO: sg[W^k exp(lambda (1 - W))] A log pi, W the product of the sequence's ratios."""
    positive = terms.a >= 0
    k, rate = (
        _either(positive, objective.constants[f"{n}_pos"], objective.constants[f"{n}_neg"], terms.d)
        for n in ("k", "lambda")
    )
    log_w = terms.segments.spread(terms.segments.sum(terms.d.detach()))
    log_w = log_w.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    weight = (k * log_w + rate * (1 - log_w.exp())).exp().to(terms.d.dtype)
    return terms.mean(weight * terms.a * terms.logprobs), torch.zeros_like(positive)


def divergence(terms: Terms, objective: Objective) -> Result:
    """DPPO: tokens whose probability has already moved by epsilon the way A pushes are dropped."""
    moved = terms.logprobs.detach().exp() - terms.old.exp()
    masked = (terms.a > 0) & (moved > objective.epsilon_high)
    masked |= (terms.a < 0) & (moved < -objective.epsilon_low)
    weight = bounded_exp(terms.d.detach()).clamp(max=objective.constants["truncate"])
    value = torch.where(masked, 0.0, weight * terms.a * terms.logprobs)
    return terms.mean(value), masked


def likelihood(terms: Terms, objective: Objective) -> Result:
    """REINFORCE: A log pi, without any ratio."""
    return terms.mean(terms.a * terms.logprobs), torch.zeros_like(terms.a, dtype=torch.bool)


def _either(
    condition: Bool[Tensor, " T"], yes: float, no: float, like: Float[Tensor, " T"]
) -> Float[Tensor, " T"]:
    """One of two numbers per token, in the dtype of `like`: where() of numbers is float32."""
    return torch.where(condition, like.new_tensor(yes), like.new_tensor(no))


SURROGATES: Mapping[Surrogate, Callable[[Terms, Objective], Result]] = {
    "clip": clip,
    "geometric": geometric,
    "truncate": truncate,
    "gate": gate,
    "gamma": gamma,
    "divergence": divergence,
    "likelihood": likelihood,
}
