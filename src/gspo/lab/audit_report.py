"""The numbers of an audit: d_t and l_i by length, against the clip range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from gspo.lab.noise import Verdict, advice, clip_noise


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
        sequence_log_ratio: l_i of the sequences.
        kl: KL(mu || pi) per token as the mean of -d_t over sampled tokens (unbiased).
        kl_k3: the same as the mean of exp(d_t) - 1 - d_t (never negative, quieter).
        clipped_positive, clipped_negative: shares that noise would clip, by the sign of A.
        epsilon_needed: the smallest epsilon that noise allows here.
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

    @property
    def mean_length(self) -> float:
        """Mean L_i."""
        return self.tokens / self.sequences


@dataclass(frozen=True)
class Block:
    """Means of d_t over blocks of `tokens` consecutive tokens of all sequences.

    Where errors of tokens are independent, `std` is the spread of d_t over sqrt(tokens).
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

    def as_json(self) -> dict[str, Any]:
        """Plain numbers, lists and texts."""
        return asdict(self)


def make_report(
    d: Sequence[np.ndarray], log_ratios: np.ndarray, clip_range: tuple[float, float], **setting: Any
) -> AuditReport:
    """Report the noise of S sequences.

    Args:
        d: of each sequence, d_t of its tokens.
        log_ratios: [S] l_i.
        clip_range: epsilon_low and epsilon_high.
        setting: the report's own fields that say what was audited.
    """
    lengths = np.array([len(own) for own in d])
    upper = 2 ** np.ceil(np.log2(lengths)).astype(int)
    buckets = tuple(
        _bucket(
            d, log_ratios, np.flatnonzero(upper == edge), (int(edge) // 2, int(edge)), clip_range
        )
        for edge in np.unique(upper)
    )
    noise = clip_noise(torch.from_numpy(log_ratios), *clip_range)
    return AuditReport(
        **setting,
        epsilon_low=clip_range[0],
        epsilon_high=clip_range[1],
        total=_bucket(d, log_ratios, np.arange(len(d)), (0, int(lengths.max())), clip_range),
        buckets=buckets,
        blocks=_blocks(d, int(lengths.max())),
        verdict=noise.verdict,
        advice=advice(noise, setting.get("rollout_dtype")),
    )


def summarise(values: np.ndarray) -> Summary:
    """Of values in float64.

    >>> summarise(np.array([1.0, 3.0]))
    Summary(mean=2.0, std=1.0, p01=1.02, p50=2.0, p99=2.98)
    """
    p01, p50, p99 = np.quantile(values, (0.01, 0.5, 0.99)).tolist()
    return Summary(float(values.mean()), float(values.std()), p01, p50, p99)


def _bucket(
    d: Sequence[np.ndarray],
    log_ratios: np.ndarray,
    chosen: np.ndarray,
    edges: tuple[int, int],
    clip_range: tuple[float, float],
) -> LengthBucket:
    tokens = np.concatenate([d[i] for i in chosen])
    noise = clip_noise(torch.from_numpy(log_ratios[chosen]), *clip_range)
    return LengthBucket(
        longer_than=edges[0],
        up_to=edges[1],
        sequences=len(chosen),
        tokens=len(tokens),
        token_log_ratio=summarise(tokens),
        sequence_log_ratio=summarise(log_ratios[chosen]),
        kl=float(-tokens.mean()),
        # expm1 keeps the small differences that this is made of.
        kl_k3=float((np.expm1(np.minimum(tokens, 40.0)) - tokens).mean()),
        clipped_positive=noise.clipped_positive,
        clipped_negative=noise.clipped_negative,
        epsilon_needed=noise.epsilon_needed,
    )


def _blocks(d: Sequence[np.ndarray], longest: int) -> tuple[Block, ...]:
    out = []
    for exponent in range(longest.bit_length()):
        size = 2**exponent
        means = np.concatenate(
            [own[: len(own) // size * size].reshape(-1, size).mean(axis=1) for own in d]
        )
        out.append(Block(size, len(means), float(means.std())))
    return tuple(out)
