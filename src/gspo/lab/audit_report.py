"""What an audit says: d_t and l_i by length against the clip range, a verdict, and the text.

Noise is l_i on unchanged weights: engine and trainer disagree although the policy has not moved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import ROUND_UP, Context
from typing import Any

import numpy as np

from gspo.core.tables import as_text, cells, table

TOLERATED = 0.05
"""Share of the sequences that noise may clip."""
FINE = 0.5
"""Noise up to this share of the clip range leaves room for the update itself."""

# Not int8 -> bfloat16: weights of 8 bits and a scale lose less than activations of 8 bits do.
_QUIETER = {"int4": "int8", "int8": "float32", "bfloat16": "float16 or float32"}
_QUIETER |= {"float16": "float32"}
_SUMMARY = ("mean", "std", "p01", "p50", "p99")
_BY_TOKEN = ("length", "tokens", *_SUMMARY, "kl", "kl_k3")
_BY_SEQUENCE = ("length", "sequences", *_SUMMARY, "clipped_positive", "clipped_negative")


def make_report(
    d: Sequence[np.ndarray], log_ratios: np.ndarray, asked: Mapping[str, Any]
) -> dict[str, Any]:
    """Report the noise of S sequences.

    Args:
        d: of each sequence, d_t of its tokens.
        log_ratios: [S] l_i.
        asked: what was audited: what `run_audit` was given, and `routing_agreement`.

    Returns:
        A JSON object: what was asked, and
        `total` and `buckets`: all sequences, and those of each power of two of the length, see
            `_bucket`;
        `verdict`, which is `fine`, `tight` or `noisy`, and `advice`.
    """
    lengths = np.array([len(tokens) for tokens in d])
    powers = np.unique(2 ** np.ceil(np.log2(lengths)).astype(int)).tolist()
    longest = int(lengths.max())
    clip_range = asked["epsilon_low"], asked["epsilon_high"]
    edges = [(0, longest), *((power // 2, power) for power in powers)]
    total, *buckets = (_bucket(d, log_ratios, clip_band(*clip_range), *pair) for pair in edges)
    share = total["epsilon_needed"] / min(clip_range)
    verdict = "fine" if share <= FINE else "tight" if share <= 1 else "noisy"
    return {
        **asked,
        "total": total,
        "buckets": buckets,
        "verdict": verdict,
        "advice": _advice(total, share, verdict, asked["rollout_dtype"]),
    }


def summarise(values: np.ndarray) -> dict[str, float]:
    """Summarise values in float64.

    >>> summarise(np.array([1.0, 3.0]))
    {'mean': 2.0, 'std': 1.0, 'p01': 1.02, 'p50': 2.0, 'p99': 2.98}
    """
    quantiles = np.quantile(values, (0.01, 0.5, 0.99)).tolist()
    mean_and_spread = (float(values.mean()), float(values.std()))
    return dict(zip(_SUMMARY, (*mean_and_spread, *quantiles), strict=True))


def clip_band(epsilon_low: float, epsilon_high: float) -> tuple[float, float]:
    """The log-ratios at which clipping begins, for A < 0 and for A > 0.

    >>> clip_band(1.0, 0.0)
    (-inf, 0.0)
    """
    return (math.log1p(-epsilon_low) if epsilon_low < 1 else -math.inf), math.log1p(epsilon_high)


def _bucket(
    d: Sequence[np.ndarray],
    log_ratios: np.ndarray,
    band: tuple[float, float],
    longer_than: int,
    up_to: int,
) -> dict[str, Any]:
    """Sequences of `longer_than` < L <= `up_to` sampled tokens.

    `clipped_positive` is the share that would be clipped had it A > 0. `epsilon_needed` on both
    sides clips at most `TOLERATED` of the sequences by noise.
    """
    chosen = [i for i, tokens in enumerate(d) if longer_than < len(tokens) <= up_to]
    tokens, log_ratios = np.concatenate([d[i] for i in chosen]), log_ratios[chosen]
    return {
        "longer_than": longer_than,
        "up_to": up_to,
        "sequences": len(log_ratios),
        "tokens": len(tokens),
        "token_log_ratio": summarise(tokens),
        "sequence_log_ratio": summarise(log_ratios),
        # KL(mu || pi) per token, unbiased; then as the mean of exp(d_t) - 1 - d_t, which is never
        # negative. expm1 keeps the small differences that this is made of.
        "kl": float(-tokens.mean()),
        "kl_k3": float((np.expm1(np.minimum(tokens, 40.0)) - tokens).mean()),
        "clipped_positive": float((log_ratios > band[1]).mean()),
        "clipped_negative": float((log_ratios < band[0]).mean()),
        "epsilon_needed": float(np.quantile(np.abs(np.expm1(log_ratios)), 1 - TOLERATED)),
    }


def _advice(total: Mapping[str, Any], share: float, verdict: str, rollout_dtype: str) -> str:
    """One line: how wide the noise is, and what to change if it is too wide."""
    size = f"noise is {f'{share:.2g}' if share < 100 else f'{share:.0f}'}x of the clip range"
    if verdict == "fine":
        return f"{size}: fine"
    tight = verdict == "tight"
    effect = ": it clips little by itself but takes the update's room"
    if not tight:
        effect = (
            f" and alone would clip {total['clipped_positive']:.0%} of positive-advantage and "
            f"{total['clipped_negative']:.0%} of negative-advantage sequences"
        )
    remedies = ["take old_logprobs='trainer' with a correction of pi_old/mu"]
    if abs(total["sequence_log_ratio"]["mean"]) > total["sequence_log_ratio"]["std"]:
        remedies[0] += " (most of the noise is bias, which no length averages out)"
    needed = total["epsilon_needed"] / (FINE if tight else 1)
    # Up to two digits, which is more than the estimate is worth.
    epsilon = float(Context(prec=2, rounding=ROUND_UP).create_decimal(f"{needed:.9g}"))
    if epsilon < 1:  # the surest remedy stands first
        remedies.insert(0, f"raise epsilon to {'' if tight else 'at least '}{epsilon:g}")
    if rollout_dtype in _QUIETER:
        remedies.append(f"sample in {_QUIETER[rollout_dtype]}")
    return f"{size}{effect}: {'; or '.join(remedies)}"


def render(report: Mapping[str, Any]) -> str:
    """The report as text; its tables are at most 120 columns wide."""
    total, rows = report["total"], []
    for bucket in (*report["buckets"], total) if len(report["buckets"]) > 1 else [total]:
        length = "all" if bucket is total else f"{bucket['longer_than'] + 1}..{bucket['up_to']}"
        rows.append(bucket | {"length": length})
    parts = [
        f"{report['model']}, sampled in {report['rollout_dtype']}, scored in float32, unchanged "
        f"weights: {total['sequences']} sequences, {total['tokens']} tokens",
        table(
            cells(_BY_TOKEN, [row | row["token_log_ratio"] for row in rows]),
            "d_t = log pi - log mu of the sampled tokens",
        ),
        table(
            cells(_BY_SEQUENCE, [row | row["sequence_log_ratio"] for row in rows]),
            "l_i = mean of d_t over a sequence; shares that noise alone would clip",
        ),
    ]
    if (agreement := report["routing_agreement"]) is not None:
        parts.append(f"routing agreement  {agreement:.2%} of the experts' slots")
    return as_text(
        [
            *parts,
            f"clip range         [1 - {report['epsilon_low']:g}, 1 + {report['epsilon_high']:g}]",
            f"noise allows       epsilon >= {total['epsilon_needed']:.2g} "
            "(clips 5 % of the sequences)",
            f"verdict            {report['advice']}",
        ],
        width=120,
    )
