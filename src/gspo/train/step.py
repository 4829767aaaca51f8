"""One optimizer step: microbatches forward and backward, then one update."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.core.errors import NumericsError
from gspo.core.metrics import Metrics
from gspo.core.timing import span
from gspo.data.packing import PackedBatch
from gspo.data.sample import Sample
from gspo.kernels.logprob import TokenLogprobs
from gspo.kernels.shared_prompt_attention import SharedPromptAttention
from gspo.objective import (
    LossOutput,
    Objective,
    Segments,
    clipped_surrogate,
    policy_loss,
    sequence_log_ratio,
)
from gspo.policy.policy import Policy
from gspo.policy.workers import Workers
from gspo.train.expert_replay import StepRouting, Watched
from gspo.train.rows import rows_of
from gspo.train.trace import Trace, traces

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
        share: prefixes that samples have in common are computed once.
        update: the optimizer step of the call, from 0.
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
    share: bool = False
    update: int = 0
    on_policy: bool = False
    routing: StepRouting | None = None


def accumulate(
    policy: Policy,
    work: StepInput,
    objective: Objective,
    metrics: Metrics,
    reference: Reference | None = None,
) -> list[Trace]:
    """Leave the gradient of the step's loss on the parameters, and its metrics in `metrics`.

    N and T are known before the first backward pass, so neither depends on the split into rows.
    Returns what the step saw of its sequences.

    Raises:
        NumericsError: the loss of a row is NaN or infinite. Its gradient may still be finite: the
            bound on ratios gives NaN a gradient of 0.
    """
    seen: list[Trace] = []
    metrics.mean("loss/policy", 0.0, 1)
    metrics.mean("loss/kl", 0.0, 1)
    routing = work.routing
    routed = routing is not None and routing.replays
    rows = rows_of(policy, work.samples, work.budget, work.unit, share=work.share, routed=routed)
    if routing is not None:
        routing.begin(rows)
    # A reference may be the policy itself with its adapters off, which is off for every thread.
    workers = policy.workers if reference is None else Workers()
    score = functools.partial(_score, policy, work, objective, reference, workers.count > 1)
    for at in range(0, len(rows), workers.count):
        for done in workers.map(score, rows[at : at + workers.count]):
            _check_finite(done)
            if done.gradients:
                _add_gradients(policy, done.gradients)
            _record(metrics, done.batch, done.scored, done.out)
            _record_packing(metrics, policy, done.batch)
            seen += traces(done.batch, done.scored.logprobs, done.out, work.update)
            if routing is not None and done.watched is not None:
                routing.record(done.batch, done.watched)
            if work.on_policy:
                _record_mismatch(metrics, done.batch, done.scored, objective)
    if routing is not None:
        routing.end()
    return seen


@dataclass(frozen=True)
class _Done:
    """A row after its backward pass; `gradients` where they are not on the parameters yet."""

    batch: PackedBatch
    scored: TokenLogprobs
    out: LossOutput
    loss: Tensor
    watched: Watched | None
    gradients: tuple[Tensor | None, ...]


def _score(
    policy: Policy,
    work: StepInput,
    objective: Objective,
    reference: Reference | None,
    apart: bool,
    batch: PackedBatch,
) -> _Done:
    """Forward and backward of one row. With `apart`, return the gradient instead of adding it, so
    that the caller can add the rows in a fixed order."""
    with nullcontext() if work.routing is None else work.routing.observe(batch) as watched:
        scored = policy.logprobs(batch, work.chunk)
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
    loss = out.loss
    if work.routing is not None and watched is not None:
        loss = loss + work.routing.coefficient * watched.balance
    gradients: tuple[Tensor | None, ...] = ()
    with span("backward"):
        if apart:
            parameters = list(policy.trainable.values())
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        else:
            loss.backward()
    return _Done(batch, scored, out, loss.detach(), watched, gradients)


def _check_finite(done: _Done) -> None:
    loss = done.loss.item()
    if math.isfinite(loss):
        return
    finite = done.out.log_ratio.isfinite().tolist()
    named = zip(done.batch.trajectory_ids, finite, strict=True)
    bad = sorted({trajectory for trajectory, good in named if not good})
    where = f"; log-ratios that are not finite: trajectory {bad[0]} ({len(bad)} in all)"
    raise NumericsError(
        f"the loss is {loss}{where if bad else ''}. Look for a temperature, a log-prob or a "
        "weight that is not finite"
    )


def _add_gradients(policy: Policy, gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(policy.trainable.values(), gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad += gradient


def _record(metrics: Metrics, batch: PackedBatch, scored: TokenLogprobs, out: LossOutput) -> None:
    """Loss and entropy of all that is trained on; ratios of the sequences with an advantage.

    The others can't be clipped. A KL term trains on them too, and must not change what a share of
    clipped sequences is a share of.
    """
    metrics.mean("loss/policy", out.policy.item(), 0)
    metrics.mean("loss/kl", out.kl.item(), 0)
    trained = batch.loss_mask.to(scored.entropy.device)
    count = int(trained.sum())
    metrics.mean("loss/entropy", scored.entropy[trained].double().sum().item(), count)
    metrics.add("tokens/trained", count)

    share = (out.clipped_tokens / out.loss_tokens.clamp(min=1)).cpu().double()
    advantages = batch.advantages
    counted = advantages != 0
    for name, chosen in (
        ("ratio/clip_fraction", counted),
        ("ratio/clip_fraction_positive", advantages > 0),
        ("ratio/clip_fraction_negative", advantages < 0),
    ):
        metrics.mean(name, share[chosen].sum().item(), int(chosen.sum()))
    clipped, tokens = out.clipped_tokens.cpu()[counted], out.loss_tokens.cpu()[counted]
    metrics.mean("ratio/clip_fraction_tokens", clipped.sum().item(), int(tokens.sum()))
    log_ratio = out.log_ratio.cpu()[counted].double()
    metrics.distribution("ratio/log", log_ratio.tolist())
    # Mean squares: their roots are the spreads of l_i and d_t, which 1/sqrt(L) relates.
    d = scored.logprobs.detach().cpu().double() - batch.old_logprobs
    d = d[counted[batch.sequence_ids]]
    metrics.mean("ratio/log_square", log_ratio.square().sum().item(), len(log_ratio))
    metrics.mean("ratio/token_log_square", d.square().sum().item(), d.numel())
    metrics.add("ratio/extreme", int(out.extreme.cpu()[counted].sum()))


def _record_packing(metrics: Metrics, policy: Policy, batch: PackedBatch) -> None:
    size = batch.token_count
    padded = SharedPromptAttention(batch).padded if policy.packing == "buckets" else size
    metrics.mean("tokens/packed_efficiency", size, padded)
    metrics.add("tokens/computed", size)
    metrics.mean("tokens/shared_saving", batch.sample_tokens - size, batch.sample_tokens)


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
