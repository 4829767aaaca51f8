"""What is done with ratio and advantage: one function and one entry per surrogate.

A surrogate takes the `Terms` of a microbatch. It returns the value v_i of each sequence, which the
loss adds up, and which tokens the clip range acts on (None: no token): it silences them (zero
gradient), or bounds their weight (`truncate`). `register_surrogate` adds one from outside.

>>> sorted(SURROGATES)[:3]
['clip', 'divergence', 'gamma']
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .ratio import MAX_LOG_RATIO, Level, PerSequence, PerToken, Segments, TokenMask, bounded_exp


@dataclass(frozen=True)
class Terms:
    """What a surrogate is made of: tokens T of S sequences, 0 where no token was sampled.

    Attributes:
        level: over what the ratio is taken.
        ratio: the importance ratio, with gradient: [S] for the level `sequence`, else [T].
        d: log pi_theta - log pi_old, with gradient.
        logprobs: log pi_theta, with gradient.
        old_logprobs: log pi_old.
        a: advantage of each token, 0 if it is not trained on.
        advantages: of each sequence, or None if they are given per token.
        low, high: the clip range's distances from 1, one number or one per ratio.
        constants: the numbers of the surrogate.
        segments: which token belongs to which sequence.
        weights: correction of each token for pi_old / mu, or None.
    """

    level: Level
    ratio: Float[Tensor, " N"]
    d: PerToken
    logprobs: PerToken
    old_logprobs: PerToken
    a: PerToken
    advantages: PerSequence | None
    low: float | Float[Tensor, " N"]
    high: float | Float[Tensor, " N"]
    constants: Mapping[str, float]
    segments: Segments
    weights: PerToken | None = None

    def mean(self, values: PerToken) -> PerSequence:
        """(1/L_i) Σ_t over the trained tokens, corrected for pi_old / mu."""
        if self.weights is not None:
            values = values * self.weights
        return self.segments.mean(torch.where(self.segments.loss_mask, values, 0.0))

    def by_sign(self, name: str) -> PerToken:
        """At each token the constant `<name>_pos` if its advantage is positive, else `_neg`."""
        positive, negative = self.constants[f"{name}_pos"], self.constants[f"{name}_neg"]
        # Tensors: where() of two numbers is float32, whatever the dtype of d.
        return torch.where(self.a > 0, self.d.new_tensor(positive), self.d.new_tensor(negative))


Result = tuple[PerSequence, TokenMask | None]


@dataclass(frozen=True)
class Surrogate:
    """An entry of the registry; see `register_surrogate`."""

    function: Callable[[Terms], Result]
    has_range: bool
    constants: tuple[str, ...] = ()
    levels: tuple[Level, ...] = ("token",)
    exponent: str | None = None
    """What it exponentiates (see `ratio.is_extreme`), if that is not the ratio of its level."""


def clipped_surrogate(
    ratio: Float[Tensor, " N"],
    advantage: Float[Tensor, " N"],
    epsilon_low: float | Float[Tensor, " N"],
    epsilon_high: float | Float[Tensor, " N"],
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """min(w A, clip(w, 1 - eps_low, 1 + eps_high) A), and whether the clip acts.

    The gradient is exactly 0 if clipped, else A dw (GSPO, equation 5).

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


def clip(terms: Terms) -> Result:
    """min(w A, clip(w) A) of PPO; w is what the objective's level makes it."""
    if terms.level != "sequence":
        value, clipped = clipped_surrogate(terms.ratio, terms.a, terms.low, terms.high)
        return terms.mean(value), clipped
    assert terms.advantages is not None
    value, clipped = clipped_surrogate(terms.ratio, terms.advantages, terms.low, terms.high)
    # Without a token there is no ratio, and the advantage may be NaN.
    return torch.where(terms.segments.lengths > 0, value, 0.0), terms.segments.spread(clipped)


def geometric(terms: Terms) -> Result:
    """GMPO: A_i exp(mean_t of d_t, clipped in log space on the side that A_i pushes to)."""
    assert terms.advantages is not None
    d, segments, low, high = terms.d, terms.segments, terms.low, terms.high
    # All sampled tokens are in the mean, trained on or not, and are clipped alike.
    side = segments.spread(terms.advantages)
    above, below = (side > 0) & (d > high), (side < 0) & (d < -low)
    limited = torch.where(above, torch.ones_like(d) * high, d)
    limited = torch.where(below, torch.ones_like(d) * -low, limited)
    limited = torch.where(segments.loss_mask, limited, limited.detach())
    value = bounded_exp(segments.mean(limited)) * terms.advantages
    return torch.where(segments.lengths > 0, value, 0.0), above | below


def truncate(terms: Terms) -> Result:
    """CISPO: sg[clamp(w, 1 - eps_low, 1 + eps_high)] A log pi. No token loses its gradient."""
    ratio = terms.ratio.detach()
    weight = ratio.clamp(1 - terms.low, 1 + terms.high)  # pyright: ignore
    return terms.mean(weight * terms.a * terms.logprobs), (weight != ratio) & (terms.a != 0)


def gate(terms: Terms) -> Result:
    """SAPO: (4 / tau) sigmoid(tau (w - 1)) A, whose gradient gate is 1 at w = 1."""
    tau = terms.by_sign("tau")
    return terms.mean(torch.sigmoid(tau * (terms.ratio - 1)) * 4 / tau * terms.a), None


def gamma(terms: Terms) -> Result:
    """VESPO: sg[W^k exp(lambda (1 - W))] A log pi, W the product of the sequence's ratios."""
    log_w = terms.segments.spread(terms.segments.sum(terms.d.detach()))
    log_w = log_w.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    weight = (terms.by_sign("k") * log_w + terms.by_sign("lambda") * (1 - log_w.exp())).exp()
    return terms.mean(weight * terms.a * terms.logprobs), None


def divergence(terms: Terms) -> Result:
    """DPPO: tokens whose probability has already moved by epsilon the way A pushes are dropped."""
    moved = terms.logprobs.detach().exp() - terms.old_logprobs.exp()
    masked = (terms.a > 0) & (moved > terms.high) | (terms.a < 0) & (moved < -terms.low)
    weight = terms.ratio.detach().clamp(max=terms.constants["truncate"])
    return terms.mean(torch.where(masked, 0.0, weight * terms.a * terms.logprobs)), masked


def likelihood(terms: Terms) -> Result:
    """REINFORCE: A log pi, without any ratio."""
    return terms.mean(terms.a * terms.logprobs), None


_GAMMA = ("k_pos", "lambda_pos", "k_neg", "lambda_neg")
SURROGATES: dict[str, Surrogate] = {
    "clip": Surrogate(clip, has_range=True, levels=get_args(Level)),
    "geometric": Surrogate(geometric, has_range=True, exponent="sequence"),
    "truncate": Surrogate(truncate, has_range=True),
    "gate": Surrogate(gate, has_range=False, constants=("tau_pos", "tau_neg")),
    "gamma": Surrogate(gamma, has_range=False, constants=_GAMMA, exponent="sum"),
    "divergence": Surrogate(divergence, has_range=True, constants=("truncate",)),
    "likelihood": Surrogate(likelihood, has_range=False, exponent="none"),
}
BUILT_IN = frozenset(SURROGATES)


def register_surrogate(
    name: str,
    function: Callable[[Terms], Result],
    *,
    has_range: bool,
    constants: Sequence[str] = (),
    levels: Sequence[Level] = ("token",),
) -> None:
    """Make `Objective(..., surrogate=name)` mean your function, in this process.

    Args:
        name: registered again, it is replaced.
        function: `Terms` -> the value v_i of each sequence, and the tokens that the clip range
            acts on, or None.
        has_range: whether it reads `terms.low` and `terms.high`; without, options refuse an
            epsilon.
        constants: names of its numbers, which each objective gives as `constants`.
        levels: those whose ratio it can take. At the level `sequence` that is one per sequence.

    Raises:
        ValueError: the name of a built-in surrogate.

    >>> def linear(terms):
    ...     return terms.mean(terms.ratio * terms.a), None
    >>> register_surrogate("linear", linear, has_range=False)
    >>> SURROGATES.pop("linear").levels
    ('token',)
    """
    if name in BUILT_IN:
        raise ValueError(f"surrogate {name!r} is built in: give yours another name")
    SURROGATES[name] = Surrogate(function, has_range, tuple(constants), tuple(levels))
