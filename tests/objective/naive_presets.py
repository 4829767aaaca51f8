"""Every preset as a loop over Python floats, written from the formulas and not from the library.

Numbers are the papers', by hand; slopes are derived by hand, with stop-gradients left out of them.
A ratio is `exp(min(x, 40))` of its exponent x, with zero gradient beyond 40: the documented bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from objective.naive import BOUND, Case, ratio


@dataclass(frozen=True)
class One:
    """One sequence's L sampled tokens. `edges` collects distances to where a branch changes."""

    new: list[float]
    old: list[float]
    trained: list[bool]
    advantage: float
    edges: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.new)

    @property
    def d(self) -> list[float]:
        return [new - old for new, old in zip(self.new, self.old, strict=True)]

    def ratio(self, exponent: float) -> tuple[float, float]:
        """The bounded ratio and its derivative."""
        self.edges.append(exponent - BOUND)
        return ratio(exponent)


@dataclass
class Parts:
    """What each of the L tokens adds to the sequence's objective (to maximise), and its slope.

    Attributes:
        values: they add up to the sequence's value. A value of the whole sequence stands first.
        slopes: derivative of the sum by each token's own log-prob.
        scales: what the rounding error of a slope grows with, besides the slope itself.
        clipped: trained tokens that the range acts on: no gradient, or (cispo) a bounded weight.
    """

    values: list[float]
    slopes: list[float]
    scales: list[float]
    clipped: int = 0


def clipped(one: One, w: float, low: float, high: float) -> tuple[float, bool]:
    """min(w A, clip(w, 1 - low, 1 + high) A), and whether the clip is what acts."""
    a = one.advantage
    one.edges.extend([w - (1 + high)] * (a > 0) + [w - (1 - low)] * (a < 0))
    free, bound = w * a, min(max(w, 1 - low), 1 + high) * a
    return min(free, bound), bound < free


def whole(one: One, low: float, high: float, factor: float = 1.0) -> Parts:
    """factor * min(s A, clip(s) A), s = exp((1/L) sum d); only trained tokens have gradient."""
    out = Parts([0.0] * one.length, [0.0] * one.length, [0.0] * one.length)
    s, ds = one.ratio(math.fsum(one.d) / one.length)
    value, silent = clipped(one, s, low, high)
    out.values[0] = factor * value
    for t, trained in enumerate(one.trained):
        if trained and silent:
            out.clipped += 1
        elif trained:
            out.slopes[t] = factor * one.advantage * ds / one.length
    return out


def by_token(one: One, term: Callable[[int], tuple[float, float, bool]]) -> Parts:
    """A sum over the trained tokens of (value, slope, clipped)."""
    out = Parts([0.0] * one.length, [0.0] * one.length, [0.0] * one.length)
    for t, trained in enumerate(one.trained):
        if trained:
            out.values[t], out.slopes[t], silent = term(t)
            out.clipped += silent
    return out


def clipped_tokens(one: One, low: float, high: float, weight: float) -> Parts:
    """weight * sum_t min(w_t A, clip(w_t) A), w_t = exp(d_t)."""

    def term(t: int) -> tuple[float, float, bool]:
        w, dw = one.ratio(one.d[t])
        value, silent = clipped(one, w, low, high)
        return weight * value, 0.0 if silent else weight * one.advantage * dw, silent

    return by_token(one, term)


def gspo(one: One, low: float = 3e-4, high: float = 4e-4) -> Parts:
    return whole(one, low, high)


def luspo(one: One, low: float = 2e-3, high: float = 2.5e-3) -> Parts:
    return whole(one, low, high, factor=one.length)


def gspo_token(one: One, low: float = 3e-4, high: float = 4e-4) -> Parts:
    s, ds = one.ratio(math.fsum(one.d) / one.length)

    def term(t: int) -> tuple[float, float, bool]:
        value, silent = clipped(one, s, low, high)  # pi / sg[pi] is 1, its slope too
        slope = 0.0 if silent else one.advantage * ds
        return value / one.length, slope / one.length, silent

    return by_token(one, term)


def grpo(one: One) -> Parts:
    return clipped_tokens(one, 0.2, 0.2, 1 / one.length)


def dr_grpo(one: One) -> Parts:
    return clipped_tokens(one, 0.2, 0.2, 1.0)


def dapo(one: One) -> Parts:
    return clipped_tokens(one, 0.2, 0.28, 1.0)


def cispo(one: One) -> Parts:
    def term(t: int) -> tuple[float, float, bool]:
        w = one.ratio(one.d[t])[0]
        one.edges.append(w - (1 + 4.0))
        weight = min(w, 1 + 4.0) * one.advantage
        return weight * one.new[t], weight, w > 1 + 4.0 and one.advantage != 0

    return by_token(one, term)


def gmpo(one: One) -> Parts:
    out = Parts([0.0] * one.length, [0.0] * one.length, [0.0] * one.length)
    kept, silent = [], []
    for d in one.d:  # every sampled token counts in the mean, trained or not
        if one.advantage > 0:
            one.edges.append(d - 0.4)
            kept.append(min(d, 0.4))
        else:
            one.edges.append(d + 0.4)
            kept.append(max(d, -0.4) if one.advantage < 0 else d)
        silent.append(kept[-1] != d)
    root, droot = one.ratio(math.fsum(kept) / one.length)
    out.values[0] = one.advantage * root
    for t, trained in enumerate(one.trained):
        if trained and silent[t]:
            out.clipped += 1
        elif trained:
            out.slopes[t] = one.advantage * droot / one.length
    return out


def sapo(one: One) -> Parts:
    tau = 1.0 if one.advantage > 0 else 1.05
    weight = one.advantage / one.length

    def term(t: int) -> tuple[float, float, bool]:
        w, dw = one.ratio(one.d[t])
        x = min(tau * (w - 1), 700.0)
        gate = 4 / (2 + math.exp(x) + math.exp(-x))  # 4 sigmoid(x) (1 - sigmoid(x))
        return weight * 4 / tau / (1 + math.exp(-x)), weight * gate * dw, False

    out = by_token(one, term)
    out.scales = [abs(weight) * trained for trained in one.trained]  # 1 - sigmoid(x) cancels
    return out


def vespo(one: One) -> Parts:
    k, rate = (2.0, 3.0) if one.advantage >= 0 else (3.0, 2.0)
    log_w = math.fsum(one.d)
    kernel = math.exp(k * log_w + rate * (1 - math.exp(log_w))) if log_w < 700 else 0.0
    weight = kernel * one.advantage
    return by_token(one, lambda t: (weight * one.new[t], weight, False))


def dppo(one: One) -> Parts:
    def term(t: int) -> tuple[float, float, bool]:
        moved = math.exp(one.new[t]) - math.exp(one.old[t])
        one.edges.append(abs(moved) - 0.2)
        if (one.advantage > 0 and moved > 0.2) or (one.advantage < 0 and moved < -0.2):
            return 0.0, 0.0, True
        weight = min(one.ratio(one.d[t])[0], 20.0) * one.advantage
        return weight * one.new[t], weight, False

    return by_token(one, term)


def likelihood(one: One) -> Parts:
    return by_token(one, lambda t: (one.advantage * one.new[t], one.advantage, False))


LOOPS: dict[str, tuple[Callable[[One], Parts], str]] = {
    "gspo": (gspo, "N"),
    "gspo_token": (gspo_token, "N"),
    "sampo": (lambda one: gspo_token(one, 3e-3, 4e-3), "N"),
    "grpo": (grpo, "N"),
    "dr_grpo": (dr_grpo, "N"),
    "dapo": (dapo, "T"),
    "cispo": (cispo, "T"),
    "gmpo": (gmpo, "N"),
    "sapo": (sapo, "N"),
    "luspo": (luspo, "N"),
    "vespo": (vespo, "T"),
    "dppo": (dppo, "T"),
    "rloo": (likelihood, "N"),
    "reinforce": (likelihood, "N"),
}
"""Of each preset, the value of one sequence, and what the sum is divided by."""


SUMS = frozenset({"dr_grpo", "luspo", "rloo", "reinforce"})
"""Presets of divisor N that add up a sequence's tokens; the others average over its L tokens."""


def add_kl(out: Found, case: Case, name: str, coef: float, total: float) -> float:
    """Add coef * k3 to what `loop` found, with the weight that a token's surrogate has.

    Returns the KL term. k3 = exp(q) - q - 1, q = log pi_ref - log pi; its slope is 1 - exp(q).
    """
    term = 0.0
    for t in range(len(case.ids)):
        if not (case.sampled[t] and case.trained[t]):
            continue
        length = int((case.sampled & (case.ids == case.ids[t])).sum())
        summed = name in SUMS or LOOPS[name][1] == "T"
        weight = (1.0 if summed else 1 / length) / total
        q = float(case.reference[t]) - float(case.new[t])
        value, slope = ratio(q)
        term += weight * (value - q - 1)
        out.loss_scale += coef * weight * (value + abs(q) + 1)
        out.gradient[t] -= coef * weight * (slope - 1)
        out.gradient_scale[t] += coef * weight * (slope + 1)
        out.margin = min(out.margin, abs(q - BOUND))
    out.loss += coef * term
    return term


@dataclass
class Found:
    """What the loop finds; `*_scale` as in `objective.naive.Expected`."""

    loss: float
    loss_scale: float
    gradient: np.ndarray
    gradient_scale: np.ndarray
    clipped: list[int]
    margin: float


Weigh = Callable[[One, list[float]], Sequence[float]]
"""Sequence, log mu of its tokens -> the correction of each token."""


def loop(
    case: Case,
    value: Callable[[One], Parts],
    total: float,
    weigh: Weigh | None = None,
    mu: np.ndarray | None = None,
) -> Found:
    """-(1/total) sum_i of the sequences' values, corrected where `weigh` is given."""
    out = Found(0.0, 0.0, np.zeros(len(case.ids)), np.zeros(len(case.ids)), [], math.inf)
    for i in range(case.count):
        where = [t for t in range(len(case.ids)) if case.ids[t] == i and case.sampled[t]]
        if not where:
            out.clipped.append(0)
            continue
        one = One(
            [float(case.new[t]) for t in where],
            [float(case.old[t]) for t in where],
            [bool(case.trained[t]) for t in where],
            float(case.advantages[i]),
        )
        parts = value(one)
        weights: Sequence[float] = [1.0] * len(where)
        if weigh is not None and mu is not None:
            weights = weigh(one, [float(mu[t]) for t in where])
        for k, t in enumerate(where):
            out.loss -= weights[k] * parts.values[k] / total
            out.loss_scale += abs(weights[k] * parts.values[k]) / total
            out.gradient[t] = -weights[k] * parts.slopes[k] / total
            out.gradient_scale[t] = abs(out.gradient[t]) + weights[k] * parts.scales[k] / total
        out.clipped.append(parts.clipped)
        out.margin = min([out.margin, *map(abs, one.edges)])
    return out
