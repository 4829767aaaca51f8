"""What one call of `train` reports: all metrics, and the trace of each trained sequence.

Tensors stay on the device until an optimizer step's last backward pass, and come to the CPU in one
transfer: reading one number after the other would make the CPU wait for the GPU each time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gspo.core.errors import NumericsError
from gspo.core.metrics import Metrics
from gspo.data.packing import Microbatch
from gspo.data.sample import TrajectorySamples, flat
from gspo.kernels.shared_prompt_attention import SharedPromptAttention
from gspo.objective import (
    LossOutput,
    Objective,
    Segments,
    clip_range,
    clipped_surrogate,
    sequence_log_ratio,
)
from gspo.policy.policy import Policy
from gspo.train.batch_metrics import describe
from gspo.train.minibatches import RolloutBatch, with_gradient


@dataclass(frozen=True)
class Trace:
    """A sequence of one optimizer step, for reports and for epsilon="auto".

    Attributes:
        log_ratio, advantage, length: l_i, A_i (the mean, if turns have their own) and L_i.
        trajectory_id: of the rollout batch.
        trained_tokens, clipped_tokens: in the loss; of those, how many the range acts on.
        token_log_ratios: [L_i] float32 d_t, in the order of sampling.
        update: the optimizer step of the call, from 0.
    """

    log_ratio: float
    advantage: float
    length: float
    trajectory_id: int
    trained_tokens: int
    clipped_tokens: int
    token_log_ratios: np.ndarray
    update: int


@dataclass(frozen=True)
class Scored:
    """A microbatch of M sampled tokens after its forward pass, without gradient.

    Attributes:
        microbatch: on the CPU.
        logprobs, entropy: [M] under the policy of this optimizer step.
        out: what the objective returned; its `loss` is the one that backward got.
    """

    microbatch: Microbatch
    logprobs: Tensor
    entropy: Tensor
    out: LossOutput


class Observer:
    """Metrics and traces of one call of `train`.

    Attributes:
        metrics: of the whole call.
        updates: optimizer steps taken so far.
    """

    def __init__(self, policy: Policy, batch: RolloutBatch):
        self.metrics = Metrics()
        self.updates = 0
        self.traces: list[Trace] = []
        self._policy, self._batch = policy, batch
        self._started = time.perf_counter()
        describe(self.metrics, batch, policy.version)

    def on_policy(self, trajectories: Sequence[TrajectorySamples]) -> bool:
        """Whether the weights are still those that sampled all tokens: then any log-ratio is a
        mismatch between engine and trainer."""
        versions = (s.policy_versions[s.ratio_mask] for s in flat(trajectories))
        return self.updates == 0 and all((v == self._policy.version).all() for v in versions)

    def record(self, step: Sequence[Scored], objective: Objective, *, on_policy: bool) -> None:
        """Read what the microbatches of an optimizer step left on the device, and record it.

        Raises:
            NumericsError: a loss is NaN or infinite. Its gradient may still be finite: the bound
                on ratios gives NaN a gradient of 0.
        """
        step = _on_cpu(step)
        for scored in step:
            _check_finite(scored)
        self.metrics.mean("loss/policy", 0.0, 1)  # a sum over microbatches, a mean over steps
        self.metrics.mean("loss/kl", 0.0, 1)
        for scored in step:
            _record_loss(self.metrics, scored)
            _record_ratios(self.metrics, scored)
            self._record_packing(scored.microbatch)
            if on_policy:
                _record_mismatch(self.metrics, scored, objective)
            self.traces += _traces(scored, self.updates)

    def updated(self, norm: float, rate: float) -> None:
        """Count an optimizer step: the gradient's norm before clipping, the learning rate."""
        self.updates += 1
        self.metrics.mean("optim/grad_norm", norm, 1)
        self.metrics.mean("optim/learning_rate", rate, 1)

    def done(self, objective: Objective) -> None:
        """Record the metrics of the whole call."""
        if objective.has_range:
            self.metrics.mean("ratio/epsilon_low", objective.epsilon_low, 1)
            self.metrics.mean("ratio/epsilon_high", objective.epsilon_high, 1)
        self.metrics.add("optim/updates", self.updates)
        trained = flat(with_gradient(self._batch.samples, objective))
        altered = sum(sample.altered_tokens for sample in trained)
        sampled = sum(sample.sampled for sample in trained)
        self.metrics.mean("tokens/altered_share", altered, sampled)
        self.metrics.add("time/train", time.perf_counter() - self._started)

    def by_trajectory(self) -> dict[int, list[Trace]]:
        """The traces of each trajectory in the order of its turns, of its last optimizer step."""
        last = {trace.trajectory_id: trace.update for trace in self.traces}
        traces: dict[int, list[Trace]] = {number: [] for number in last}
        for trace in self.traces:
            if trace.update == last[trace.trajectory_id]:
                traces[trace.trajectory_id].append(trace)
        return traces

    def _record_packing(self, microbatch: Microbatch) -> None:
        size, samples = microbatch.token_count, microbatch.sample_tokens
        tiles = self._policy.packing == "tiles"
        padded = SharedPromptAttention(microbatch).padded if tiles else size
        self.metrics.mean("tokens/packed_efficiency", size, padded)
        self.metrics.add("tokens/computed", size)
        self.metrics.mean("tokens/shared_saving", samples - size, samples)


def _on_cpu(step: Sequence[Scored]) -> list[Scored]:
    """The microbatches with all tensors on the CPU, by one transfer."""
    tensors = [[s.logprobs, s.entropy, *vars(s.out).values()] for s in step]
    together = [tensor.reshape(-1).float() for of_one in tensors for tensor in of_one]
    values = iter(torch.cat(together).cpu().split([len(values) for values in together]))
    read = [[next(values).view(t.shape).to(t.dtype) for t in of_one] for of_one in tensors]
    return [
        Scored(scored.microbatch, logprobs, entropy, LossOutput(*out))
        for scored, (logprobs, entropy, *out) in zip(step, read, strict=True)
    ]


def _check_finite(scored: Scored) -> None:
    loss, finite = scored.out.loss, scored.out.log_ratio.isfinite().tolist()
    if not loss.isfinite():
        ids = scored.microbatch.trajectory_ids
        named = [number for number, fine in zip(ids, finite, strict=True) if not fine]
        raise NumericsError(
            f"the loss is {loss.item()}; trajectories whose log-ratio is not finite: "
            f"{sorted(set(named))[:9]}. Look for a temperature, a log-prob or a weight that is NaN"
        )


def _record_loss(metrics: Metrics, scored: Scored) -> None:
    """Loss and entropy of all that is trained on."""
    metrics.mean("loss/policy", scored.out.policy.item(), 0)
    metrics.mean("loss/kl", scored.out.kl.item(), 0)
    count = len(scored.entropy)
    metrics.mean("loss/entropy", scored.entropy.double().sum().item(), count)
    metrics.add("tokens/trained", count)


def _record_ratios(metrics: Metrics, scored: Scored) -> None:
    """Ratios and clipping of the sequences with an advantage.

    The others can't be clipped. A KL term trains on them too, and must not change what a share of
    clipped sequences is a share of.
    """
    microbatch, out = scored.microbatch, scored.out
    share = (out.clipped_tokens / out.loss_tokens.clamp(min=1)).double()
    counted = microbatch.with_advantage
    _record_clipping(metrics, "ratio", share, microbatch)
    clipped, tokens = out.clipped_tokens[counted], out.loss_tokens[counted]
    metrics.mean("ratio/clip_fraction_tokens", clipped.sum().item(), int(tokens.sum()))
    log_ratio = out.log_ratio[counted].double()
    metrics.distribution("ratio/log", log_ratio.tolist())
    # Mean squares: their roots are the spreads of l_i and d_t, which 1/sqrt(L) relates.
    d = scored.logprobs.double() - microbatch.old_logprobs
    d = d[counted[microbatch.sequence_ids]]
    metrics.mean("ratio/log_square", log_ratio.square().sum().item(), len(log_ratio))
    metrics.mean("ratio/token_log_square", d.square().sum().item(), d.numel())
    metrics.add("ratio/extreme", int(out.extreme[counted].sum()))


def _record_mismatch(metrics: Metrics, scored: Scored, objective: Objective) -> None:
    """On unchanged weights: what engine and trainer disagree by, and what only that would clip."""
    microbatch, advantages = scored.microbatch, scored.microbatch.advantages
    d = scored.logprobs - microbatch.sampling_logprobs
    metrics.mean("mismatch/log_ratio_mean", d.double().sum().item(), d.numel())
    metrics.maximum("mismatch/log_ratio_abs_max", d.abs().max().item())
    sampled = torch.ones_like(d, dtype=torch.bool)
    segments = Segments(microbatch.sequence_ids, len(advantages), sampled, sampled)
    noise = sequence_log_ratio(d, segments)
    metrics.distribution("mismatch/sequence_log_ratio", noise.tolist())
    if objective.per_sequence:
        low, high = clip_range(objective, segments.lengths)
        _, clipped = clipped_surrogate(noise.exp(), advantages, low, high)
        _record_clipping(metrics, "mismatch", clipped.double(), microbatch)


def _record_clipping(metrics: Metrics, family: str, share: Tensor, microbatch: Microbatch) -> None:
    """How much of each sequence is clipped, over those with an advantage, and by its sign."""
    for name, chosen in (
        ("clip_fraction", microbatch.with_advantage),
        ("clip_fraction_positive", microbatch.advantages > 0),
        ("clip_fraction_negative", microbatch.advantages < 0),
    ):
        metrics.mean(f"{family}/{name}", share[chosen].sum().item(), int(chosen.sum()))


def _traces(scored: Scored, update: int) -> list[Trace]:
    """The traces of the S sequences of a microbatch."""
    microbatch, out = scored.microbatch, scored.out
    d = (scored.logprobs - microbatch.old_logprobs).numpy()
    ids = microbatch.sequence_ids.numpy()
    counts = np.bincount(ids, minlength=len(microbatch.advantages))
    by_sequence = np.split(d[np.argsort(ids, kind="stable")], np.cumsum(counts)[:-1])
    columns = zip(
        out.log_ratio.tolist(),
        microbatch.advantages.tolist(),
        out.lengths.tolist(),
        microbatch.trajectory_ids,
        out.loss_tokens.int().tolist(),
        out.clipped_tokens.int().tolist(),
        by_sequence,
        strict=True,
    )
    return [Trace(*values, update=update) for values in columns]
