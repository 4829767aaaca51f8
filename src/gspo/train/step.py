"""One optimizer step: microbatches forward and backward, then one update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.batch.pack import PackedBatch, pack
from gspo.batch.sample import Sample
from gspo.metrics import Metrics
from gspo.objective import (
    LossOutput,
    Objective,
    Segments,
    clipped_surrogate,
    policy_loss,
    sequence_log_ratio,
)
from gspo.policy.attention import padded_share
from gspo.policy.forward import forward
from gspo.policy.load import Policy
from gspo.policy.logprob import TokenLogprobs
from gspo.timing import span
from gspo.train.calibration import Observed
from gspo.train.routing import StepRouting

Reference = Callable[[PackedBatch], Float[Tensor, " M"]]


@dataclass(frozen=True)
class StepInput:
    """What one optimizer step is computed from.

    Attributes:
        samples: of the trajectories that need a forward pass.
        total_sequences: N, those without one included.
        budget: tokens of a packed row.
        chunk: tokens whose logits exist at once.
        total_tokens: T, the trained tokens of those sequences.
        unit: what a sequence is, `trajectory` or `turn`.
        on_policy: the weights are still those that sampled: any log-ratio is a mismatch between
            engine and trainer.
        routing: of an MoE model: replay, load balance and metrics.
    """

    samples: Sequence[Sample]
    total_sequences: int
    total_tokens: int
    budget: int
    chunk: int | None
    unit: Literal["trajectory", "turn"] = "trajectory"
    on_policy: bool = False
    routing: StepRouting | None = None


def accumulate(
    policy: Policy,
    work: StepInput,
    objective: Objective,
    metrics: Metrics,
    reference: Reference | None = None,
) -> list[Observed]:
    """Leave the gradient of the step's loss on the parameters, and its metrics in `metrics`.

    N and T are known before the first backward pass, so neither depends on the split into rows.
    Returns what the step saw of its sequences.
    """
    seen: list[Observed] = []
    metrics.mean("loss/policy", 0.0, 1)
    metrics.mean("loss/kl", 0.0, 1)
    rows, routing = pack(work.samples, work.budget, work.unit), work.routing
    if routing is not None:
        routing.begin(rows)
    for batch in rows:
        with nullcontext() if routing is None else routing.observe(batch):
            scored = forward(policy, batch, work.chunk)
        device = scored.logprobs.device
        out = policy_loss(
            scored.logprobs,
            batch.old_logprobs.to(device),
            batch.sequence_ids.to(device),
            batch.advantages.to(device),
            objective,
            loss_mask=batch.loss_mask.to(device),
            total_sequences=work.total_sequences,
            total_tokens=work.total_tokens,
            sampling_logprobs=None
            if objective.correction is None
            else batch.sampling_logprobs.to(device),
            reference_logprobs=None if reference is None else reference(batch),
        )
        loss = out.loss if routing is None else out.loss + routing.balance_loss()
        with span("backward"):
            loss.backward()
        _record(metrics, batch, scored, out)
        buckets = policy.packing == "buckets"
        real, computed = padded_share(batch.lengths) if buckets else (1, 1)
        metrics.mean("tokens/packed_efficiency", real, computed)
        own = zip(
            out.log_ratio.tolist(), batch.advantages.tolist(), out.lengths.tolist(), strict=True
        )
        seen.extend(Observed(*values) for values in own)
        if work.on_policy:
            _record_mismatch(metrics, batch, scored, objective)
    if routing is not None:
        routing.end()
    return seen


def _record(metrics: Metrics, batch: PackedBatch, scored: TokenLogprobs, out: LossOutput) -> None:
    metrics.mean("loss/policy", out.policy.item(), 0)
    metrics.mean("loss/kl", out.kl.item(), 0)
    trained = batch.loss_mask.to(scored.entropy.device)
    count = int(trained.sum())
    metrics.mean("loss/entropy", scored.entropy[trained].double().sum().item(), count)
    metrics.add("tokens/trained", count)

    share = (out.clipped_tokens / out.loss_tokens.clamp(min=1)).cpu().double()
    advantages = batch.advantages
    for name, chosen in (
        ("ratio/clip_fraction", torch.ones_like(advantages, dtype=torch.bool)),
        ("ratio/clip_fraction_positive", advantages > 0),
        ("ratio/clip_fraction_negative", advantages < 0),
    ):
        metrics.mean(name, share[chosen].sum().item(), int(chosen.sum()))
    metrics.mean("ratio/clip_fraction_tokens", out.clipped_tokens.sum().item(), count)
    metrics.distribution("ratio/log", out.log_ratio.tolist())
    metrics.add("ratio/extreme", int(out.extreme.sum()))


def _record_mismatch(
    metrics: Metrics, batch: PackedBatch, scored: TokenLogprobs, objective: Objective
) -> None:
    """On unchanged weights: what engine and trainer disagree by, and what that alone would clip."""
    d = scored.logprobs.detach().cpu() - batch.sampling_logprobs
    metrics.mean("mismatch/log_ratio_mean", d.double().sum().item(), d.numel())
    metrics.maximum("mismatch/log_ratio_abs_max", d.abs().max().item())
    every = torch.ones_like(d, dtype=torch.bool)
    segments = Segments(batch.sequence_ids, len(batch.advantages), every, every)
    noise = sequence_log_ratio(d, segments)
    metrics.distribution("mismatch/sequence_log_ratio", noise.tolist())
    if objective.level not in ("sequence", "sequence_token"):
        return
    by_length = objective.epsilon_scale == "sqrt_length"
    scale = segments.lengths.rsqrt() if by_length else torch.ones_like(noise)
    advantages = batch.advantages
    _, clipped = clipped_surrogate(
        noise.exp(), advantages, objective.epsilon_low * scale, objective.epsilon_high * scale
    )
    for name, chosen in (
        ("mismatch/clip_fraction", advantages != 0),
        ("mismatch/clip_fraction_positive", advantages > 0),
        ("mismatch/clip_fraction_negative", advantages < 0),
    ):
        metrics.mean(name, int(clipped[chosen].sum()), int(chosen.sum()))
