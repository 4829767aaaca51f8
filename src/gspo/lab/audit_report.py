"""What an audit says: d_t and l_i by length against the clip range, a verdict, and the text.

Noise is l_i on unchanged weights: engine and trainer disagree although the policy has not moved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from rich.table import Table

from gspo.lab.text_table import as_text, table

TOLERATED = 0.05
"""Share of the sequences that noise may clip."""
FINE = 0.5
"""Noise up to this share of the clip range leaves room for the update itself."""

Verdict = Literal["fine", "tight", "noisy"]

# Not int8 -> bfloat16: weights of 8 bits and a scale lose less than activations of 8 bits do.
_QUIETER = {
    "int4": "int8",
    "int8": "float32",
    "bfloat16": "float16 or float32",
    "float16": "float32",
}


@dataclass(frozen=True)
class Summary:
    """Mean, standard deviation and quantiles."""

    mean: float
    std: float
    p01: float
    p50: float
    p99: float


@dataclass(frozen=True)
class LengthBucket:
    """Sequences of `longer_than` < L <= `up_to` sampled tokens.

    Attributes:
        token_log_ratio: d_t = log pi - log mu of the tokens.
        sequence_log_ratio: l_i of the sequences. Its mean is a bias: the same at any length.
        kl: KL(mu || pi) per token as the mean of -d_t over sampled tokens (unbiased).
        kl_k3: the same as the mean of exp(d_t) - 1 - d_t (never negative, quieter).
        clipped_positive: share that would be clipped had it A > 0: l_i > log(1 + epsilon_high).
        clipped_negative: share that would be clipped had it A < 0: l_i < log(1 - epsilon_low).
        epsilon_needed: the 95 % quantile of |exp(l_i) - 1|. A clip range of this on both sides
            clips at most `TOLERATED` of the sequences by noise.
    """

    longer_than: int
    up_to: int
    sequences: int
    tokens: int
    token_log_ratio: Summary
    sequence_log_ratio: Summary
    kl: float
    kl_k3: float
    clipped_positive: float
    clipped_negative: float
    epsilon_needed: float


@dataclass(frozen=True)
class Block:
    """Means of d_t over blocks of `tokens` consecutive tokens of all sequences.

    If errors of tokens are independent, `std` is the spread of d_t over sqrt(tokens).
    """

    tokens: int
    blocks: int
    std: float


@dataclass(frozen=True)
class AuditReport:
    """One audit; `asdict` of it is what `--json` prints.

    Attributes:
        total: all sequences.
        buckets: by powers of two of the length.
        blocks: how the spread falls as more tokens are averaged.
        routing_agreement: share of the experts' slots that engine and trainer choose alike; None
            if the engine returns no expert choices.
    """

    model: str
    rollout_dtype: str
    task: str
    prompts: int
    completions: int
    temperature: float
    epsilon_low: float
    epsilon_high: float
    total: LengthBucket
    buckets: tuple[LengthBucket, ...]
    blocks: tuple[Block, ...]
    verdict: Verdict
    advice: str
    routing_agreement: float | None = None


def make_report(
    d: Sequence[np.ndarray], log_ratios: np.ndarray, clip_range: tuple[float, float], **asked: Any
) -> AuditReport:
    """Report the noise of S sequences.

    Args:
        d: of each sequence, d_t of its tokens.
        log_ratios: [S] l_i.
        clip_range: epsilon_low and epsilon_high.
        asked: the fields of the report that say what was audited.
    """
    lengths = np.array([len(tokens) for tokens in d])
    powers = np.unique(2 ** np.ceil(np.log2(lengths)).astype(int)).tolist()
    longest = int(lengths.max())
    edges = [(0, longest), *((power // 2, power) for power in powers)]
    total, *buckets = (_bucket(d, log_ratios, clip_range, *pair) for pair in edges)
    share = total.epsilon_needed / min(clip_range)
    verdict = "fine" if share <= FINE else "tight" if share <= 1 else "noisy"
    return AuditReport(
        **asked,
        epsilon_low=clip_range[0],
        epsilon_high=clip_range[1],
        total=total,
        buckets=tuple(buckets),
        blocks=tuple(_block(d, 2**power) for power in range(longest.bit_length())),
        verdict=verdict,
        advice=_advice(total, share, verdict, asked.get("rollout_dtype")),
    )


def summarise(values: np.ndarray) -> Summary:
    """Summarise values in float64.

    >>> summarise(np.array([1.0, 3.0]))
    Summary(mean=2.0, std=1.0, p01=1.02, p50=2.0, p99=2.98)
    """
    p01, p50, p99 = np.quantile(values, (0.01, 0.5, 0.99)).tolist()
    return Summary(float(values.mean()), float(values.std()), p01, p50, p99)


def clip_band(epsilon_low: float, epsilon_high: float) -> tuple[float, float]:
    """The log-ratios at which clipping begins, for A < 0 and for A > 0.

    >>> clip_band(1.0, 0.0)
    (-inf, 0.0)
    """
    return (math.log1p(-epsilon_low) if epsilon_low < 1 else -math.inf), math.log1p(epsilon_high)


def _bucket(
    d: Sequence[np.ndarray],
    log_ratios: np.ndarray,
    clip_range: tuple[float, float],
    longer_than: int,
    up_to: int,
) -> LengthBucket:
    chosen = [i for i, tokens in enumerate(d) if longer_than < len(tokens) <= up_to]
    tokens, log_ratios = np.concatenate([d[i] for i in chosen]), log_ratios[chosen]
    low, high = clip_band(*clip_range)
    return LengthBucket(
        longer_than=longer_than,
        up_to=up_to,
        sequences=len(log_ratios),
        tokens=len(tokens),
        token_log_ratio=summarise(tokens),
        sequence_log_ratio=summarise(log_ratios),
        kl=float(-tokens.mean()),
        # expm1 keeps the small differences that this is made of.
        kl_k3=float((np.expm1(np.minimum(tokens, 40.0)) - tokens).mean()),
        clipped_positive=float((log_ratios > high).mean()),
        clipped_negative=float((log_ratios < low).mean()),
        epsilon_needed=float(np.quantile(np.abs(np.expm1(log_ratios)), 1 - TOLERATED)),
    )


def _block(d: Sequence[np.ndarray], size: int) -> Block:
    whole = [tokens[: len(tokens) // size * size].reshape(-1, size) for tokens in d]
    means = np.concatenate([blocks.mean(axis=1) for blocks in whole])
    return Block(size, len(means), float(means.std()))


def _advice(total: LengthBucket, share: float, verdict: Verdict, rollout_dtype: str | None) -> str:
    """One line: how wide the noise is, and what to change if it is too wide."""
    size = f"noise is {f'{share:.2g}' if share < 100 else f'{share:.0f}'}x of the clip range"
    if verdict == "fine":
        return f"{size}: fine"
    tight = verdict == "tight"
    effect = ": it clips little by itself but takes the update's room"
    if not tight:
        effect = (
            f" and alone would clip {total.clipped_positive:.0%} of positive-advantage and "
            f"{total.clipped_negative:.0%} of negative-advantage sequences"
        )
    remedies = ["take old_logprobs='trainer' with a correction of pi_old/mu"]
    if abs(total.sequence_log_ratio.mean) > total.sequence_log_ratio.std:
        remedies[0] += " (most of the noise is bias, which no length averages out)"
    epsilon = _rounded_up(total.epsilon_needed / (FINE if tight else 1))
    if epsilon < 1:  # the surest remedy stands first
        remedies.insert(0, f"raise epsilon to {'' if tight else 'at least '}{epsilon:g}")
    if rollout_dtype in _QUIETER:
        remedies.append(f"sample in {_QUIETER[rollout_dtype]}")
    return f"{size}{effect}: {'; or '.join(remedies)}"


def _rounded_up(value: float) -> float:
    """Round up to two digits, which is more than the estimate is worth.

    >>> _rounded_up(0.01734)
    0.018
    """
    if not 0 < value < math.inf:
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return round(math.ceil(value / unit - 1e-9) * unit, 12)


def render(report: AuditReport) -> str:
    """The report as text; its tables are at most 120 columns wide."""
    total = report.total
    labels = [f"{bucket.longer_than + 1}..{bucket.up_to}" for bucket in report.buckets]
    labelled = [*zip(labels, report.buckets, strict=True), ("all", total)]
    by_token, by_sequence = [], []
    for label, bucket in labelled if len(labels) > 1 else labelled[:1]:
        kl = (f"{bucket.kl:.2g}", f"{bucket.kl_k3:.2g}")
        clipped = (f"{bucket.clipped_positive:.1%}", f"{bucket.clipped_negative:.1%}")
        summary = _numbers(bucket.token_log_ratio)
        by_token.append([label, str(bucket.tokens), *summary, *kl])
        summary = _numbers(bucket.sequence_log_ratio)
        by_sequence.append([label, str(bucket.sequences), *summary, *clipped])
    names = ("mean", "spread", "p01", "p50", "p99")
    parts: list[str | Table] = [
        f"{report.model}, sampled in {report.rollout_dtype}, scored in float32, unchanged weights: "
        f"{total.sequences} sequences, {total.tokens} tokens",
        table(
            ("length", "tokens", *names, "KL", "KL (k3)"),
            by_token,
            title="d_t = log pi - log mu of the sampled tokens",
            labels="right",
        ),
        table(
            ("length", "sequences", *names, "clip A>0", "clip A<0"),
            by_sequence,
            title="l_i = mean of d_t over a sequence; shares that noise alone would clip",
            labels="right",
        ),
    ]
    if report.routing_agreement is not None:
        parts.append(f"routing agreement  {report.routing_agreement:.2%} of the experts' slots")
    parts += [
        f"clip range         [1 - {report.epsilon_low:g}, 1 + {report.epsilon_high:g}]",
        f"noise allows       epsilon >= {total.epsilon_needed:.2g} (clips 5 % of the sequences)",
        f"verdict            {report.advice}",
    ]
    return as_text(parts, width=120)


def _numbers(values: Summary) -> list[str]:
    return [f"{value:.2g}" for value in asdict(values).values()]
