"""The objective as a loop over Python floats, written from the formulas and not from the library.

A ratio is `exp(min(x, 40))` of its exponent x, with zero gradient beyond 40: the documented bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

BOUND = 40.0


@dataclass(frozen=True)
class Case:
    """T tokens of S sequences, in float64. Values of tokens that were not sampled mean nothing.

    `token_advantages` are used instead of `advantages` where `per_token` is set.
    """

    ids: np.ndarray
    new: np.ndarray
    old: np.ndarray
    reference: np.ndarray
    sampled: np.ndarray
    trained: np.ndarray
    advantages: np.ndarray
    token_advantages: np.ndarray
    per_token: bool = False

    @property
    def count(self) -> int:
        return len(self.advantages)


@dataclass
class Expected:
    """What the loop finds. `*_scale` are sums of magnitudes: what rounding errors grow with."""

    loss: float = 0.0
    loss_scale: float = 0.0
    policy: float = 0.0
    kl: float = 0.0
    kl_scale: float = 0.0
    gradient: np.ndarray = field(default_factory=lambda: np.zeros(0))
    gradient_scale: np.ndarray = field(default_factory=lambda: np.zeros(0))
    log_ratio: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    loss_tokens: list[int] = field(default_factory=list)
    clipped_tokens: list[int] = field(default_factory=list)
    extreme: list[bool] = field(default_factory=list)
    margin: float = math.inf
    """Distance of the nearest ratio (or exponent) to where the clip (or the bound) sets in."""


def ratio(exponent: float) -> tuple[float, float]:
    """The bounded ratio and its derivative."""
    if exponent > BOUND:
        return math.exp(BOUND), 0.0
    return math.exp(exponent), math.exp(exponent)


def terms(level: str, d: list[float], mean: float) -> list[tuple[float, float, float]]:
    """(ratio, its derivative by the token's own log-prob, by the sequence's log-ratio).

    One for the whole sequence at level `sequence`, else one per token.
    """
    s, ds = ratio(mean)
    if level == "sequence":
        return [(s, 0.0, ds)]
    out = []
    for d_t in d:
        w, dw = ratio(d_t)
        if level == "token":
            out.append((w, dw, 0.0))
        elif level == "sequence_token":
            out.append((s, ds, 0.0))
        elif level == "average":
            out.append(((w + s) / 2, dw / 2, ds / 2))
        else:
            root, droot = ratio((d_t + mean) / 2)
            out.append((root, droot / 2, droot / 2))
    return out


def exponents(level: str, d: list[float], mean: float) -> list[float]:
    """The log-ratios that the level takes the exponential of."""
    return {
        "token": d,
        "sequence": [mean],
        "sequence_token": [mean],
        "average": [*d, mean],
        "geometric_average": [(d_t + mean) / 2 for d_t in d],
    }[level]


def naive(
    case: Case, level: str, low: float, high: float, total: int, kl_coef: float = 0.0
) -> Expected:
    """Loss, gradient and statistics of a case: -(1/N) sum_i, plus the KL term."""
    out = Expected(gradient=np.zeros(len(case.ids)), gradient_scale=np.zeros(len(case.ids)))
    for i in range(case.count):
        sampled = [t for t in range(len(case.ids)) if case.ids[t] == i and case.sampled[t]]
        _sequence(out, case, i, sampled, level, low, high, total)
        if kl_coef:
            _kl(out, case, sampled, kl_coef, total)
    out.loss = out.policy + kl_coef * out.kl
    out.loss_scale += kl_coef * out.kl_scale
    return out


def _sequence(
    out: Expected,
    case: Case,
    i: int,
    sampled: list[int],
    level: str,
    low: float,
    high: float,
    total: int,
) -> None:
    length = len(sampled)
    trained = [t for t in sampled if case.trained[t]]
    d = {t: float(case.new[t]) - float(case.old[t]) for t in sampled}
    mean = math.fsum(d.values()) / length if length else 0.0
    out.lengths.append(length)
    out.loss_tokens.append(len(trained))
    out.log_ratio.append(mean)
    used = exponents(level, list(d.values()), mean)
    out.extreme.append(any(abs(x) > BOUND for x in used))
    out.margin = min([out.margin, *(abs(abs(x) - BOUND) for x in used)])

    clipped = 0
    shared = shared_scale = 0.0  # sum over the terms of their derivative by the mean log-ratio
    subjects = trained if level != "sequence" else [None]
    for t, (w, own, by_mean) in zip(
        subjects, terms(level, [d[t] for t in trained], mean) if length else [], strict=False
    ):
        advantage = float(case.token_advantages[t] if case.per_token else case.advantages[i])
        weight = 1.0 if t is None else 1.0 / length
        free, bounded = w * advantage, min(max(w, 1 - low), 1 + high) * advantage
        out.policy -= weight * min(free, bounded) / total
        out.loss_scale += abs(weight * min(free, bounded)) / total
        if advantage != 0:
            edge = 1 + high if advantage > 0 else 1 - low
            out.margin = min(out.margin, abs(w - edge))
        if bounded < free:
            clipped += len(trained) if t is None else 1
            continue
        shared += weight * advantage * by_mean
        shared_scale += abs(weight * advantage * by_mean)
        if t is not None:
            out.gradient[t] -= weight * advantage * own / total
    out.clipped_tokens.append(clipped)
    for t in trained:
        out.gradient[t] -= shared / length / total
    # The rounding errors of a sequence's gradient are those of its largest part.
    largest = max((abs(out.gradient[t]) for t in trained), default=0.0)
    for t in trained:
        out.gradient_scale[t] = largest + shared_scale / length / total


def _kl(out: Expected, case: Case, sampled: list[int], kl_coef: float, total: int) -> None:
    for t in sampled:
        if case.trained[t]:
            q = float(case.reference[t]) - float(case.new[t])
            value, slope = ratio(q)
            part = (value - q - 1.0) / len(sampled) / total
            out.kl += part
            out.kl_scale += (value + abs(q) + 1.0) / len(sampled) / total
            out.gradient[t] -= kl_coef * (slope - 1.0) / len(sampled) / total
            out.gradient_scale[t] += kl_coef * (slope + 1.0) / len(sampled) / total
            out.margin = min(out.margin, abs(q - BOUND))
