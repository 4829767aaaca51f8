"""The expert choices of an MoE model while it trains: replay, load balance, and their metrics.

Replay is one mechanism with two sources: the expert choices of a sample are the engine's (R3, arXiv
2510.11370), or are overwritten before the first update by those of a forward pass of the trainer
(R2, arXiv 2512.01374). After that, both are replayed by the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import chain

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

from gspo.core.errors import ConfigError, DataError
from gspo.core.metrics import Metrics
from gspo.data.packing import Microbatch
from gspo.data.sample import Sample, TrajectorySamples, flat
from gspo.policy.moe import ExpertChoices
from gspo.policy.policy import Policy
from gspo.train.minibatches import with_gradient
from gspo.train.old_logprobs import rescored, with_trainer_logprobs
from gspo.train.settings import Settings


class ExpertReplay:
    """What one call of `train` does with the expert choices; nothing in a dense model.

    `check`, and `fixed` before the first update; for each optimizer step `begin`, `watch` and
    `record` each of its microbatches, `end`; `finish` after the last update.

    Args:
        policy: it must not be updated before `start` has returned.
        settings: which replay, and which metrics.
        metrics: of the call.
    """

    def __init__(self, policy: Policy, settings: Settings, metrics: Metrics):
        self.policy, self.settings, self.metrics = policy, settings, metrics
        self.coefficient = settings.router_aux_loss_coef
        self.replays = settings.routing_replay != "none"
        self._strict = self.replays or self.coefficient > 0 or settings.measure_routing
        self._before: list[list[TrajectorySamples]] = []
        self._compares = False
        self._weights: Tensor | None = None
        self._loads: list[Tensor] = []

    def check(self, trajectories: Sequence[TrajectorySamples]) -> None:
        """Refuse what cannot be done, before any work.

        Raises:
            ConfigError: an option of MoE models on a dense one, or a replay of rollouts without
                expert choices.
            DataError: expert choices that are not of this model.
        """
        for name in ("routing_replay", "router_aux_loss_coef", "measure_routing"):
            if (value := getattr(self.settings, name)) not in ("none", 0):
                self.policy.routers.require(f"{name}={value!r}")
        layers, experts = len(self.policy.routers.modules), self.policy.routers.experts
        for sample in flat(trajectories):
            where = f"group {sample.group_id}, trajectory {sample.trajectory_id}"
            chosen = sample.expert_choices
            shape = (0, layers) if chosen is None else chosen.shape
            missing = len(sample) - 1 - shape[0]
            if missing > 0 and self.settings.routing_replay == "rollout":
                raise ConfigError(
                    f"routing_replay='rollout', but {where} carries no expert choices of the "
                    f"engine for {missing} of its tokens: roll out with "
                    "extra_body={'return_routes': True}, or use 'old_policy'"
                )
            largest = -1 if chosen is None or chosen.size == 0 else int(chosen.max())
            fits = layers == 0 or (shape[1] == layers and largest < experts)
            if missing < -1 or (missing <= 0 and not fits):
                raise DataError(
                    f"{where}: expert choices of shape {list(shape)}, up to expert {largest}, for "
                    f"{len(sample)} tokens and a model of {layers} MoE layers of {experts} experts"
                )

    def start(
        self, minibatches: Sequence[Sequence[TrajectorySamples]]
    ) -> dict[int, TrajectorySamples]:
        """Record the trainer's choices before the first update, if the settings need them.

        Args:
            minibatches: the trajectories that each minibatch of one epoch will train on. Recorded
                in the same microbatches as they are trained, so that replay is exact to the bit.

        Returns:
            R2: by trajectory id, these samples with the choices that are to be replayed; else {}.
        """
        by_trainer = self.settings.routing_replay == "old_policy"
        if by_trainer or self.settings.measure_routing:
            self._before = [self.preferred(minibatch) for minibatch in minibatches]
        if not by_trainer:
            return {}
        recorded = list(chain(*self._before))
        for sample, preferred in zip(flat(chain(*minibatches)), flat(recorded), strict=True):
            fresh = (sample.policy_versions[sample.ratio_mask] == self.policy.version).all()
            if sample.expert_choices is not None and fresh:
                engine = torch.from_numpy(sample.expert_choices.astype(np.int16))
                record_agreement(self.metrics, engine, _choices([(preferred,)])[: len(engine)])
        return {samples[0].trajectory_id: samples for samples in recorded}

    def fixed(self, minibatches: Sequence[Sequence[TrajectorySamples]]) -> list[TrajectorySamples]:
        """The trajectories of one epoch, with what stays as it was before the first update.

        That is pi_old where the trainer computes it (`old_logprobs="trainer"`), and with R2 the
        expert choices that are replayed.
        """
        objective = self.settings.objective
        recorded = self.start([with_gradient(m, objective) for m in minibatches])
        fixed = [recorded.get(samples[0].trajectory_id, samples) for samples in chain(*minibatches)]
        if self.settings.old_logprobs == "trainer":
            return with_trainer_logprobs(self.policy, fixed, self.settings)
        return fixed

    def begin(self, microbatches: Sequence[Microbatch], *, on_policy: bool) -> None:
        """Count the loads of the whole step, which the load-balancing loss needs beforehand.

        E * sum_e f_e * P_e is not linear in f and P together. Once f is given, which has no
        gradient, the rest is a sum over tokens: the same however the step is split into
        microbatches.
        """
        self._compares = on_policy and self.settings.routing_replay != "old_policy"
        self._loads = []
        if self.coefficient == 0:
            return
        self._weights = None

        def loads_of(microbatch: Microbatch) -> Tensor:
            with torch.no_grad(), self.watch(microbatch) as choices:
                self.policy.logprobs(microbatch)
            return choices.loads()

        loads = self.policy.workers.map(loads_of, microbatches)
        tokens = sum(microbatch.sample_tokens for microbatch in microbatches)
        total = sum(loads[1:], loads[0])
        share = total.float() / total.sum(-1, keepdim=True)
        self._weights = share * (self.policy.routers.experts / tokens / len(share))

    def watch(self, microbatch: Microbatch) -> AbstractContextManager[ExpertChoices]:
        """Record the choices of a microbatch's forward pass, or replay those of its samples."""
        replay = microbatch.replayed_choices() if self.replays else None
        copies, watch = microbatch.copies, self.policy.routers.watch
        return watch(replay, balance=self._weights, copies=copies, strict=self._strict)

    def record(self, microbatch: Microbatch, choices: ExpertChoices) -> None:
        """Record the metrics of a watched microbatch."""
        if isinstance(choices.balance, Tensor):
            self.metrics.mean("loss/router_aux", choices.balance.item(), 0)
        if not choices.complete:
            return
        self._loads.append(choices.loads())
        if self._compares and microbatch.expert_choices is not None:
            preferred = choices.preferred().cpu()[microbatch.index]
            record_agreement(self.metrics, microbatch.expert_choices, preferred)

    def end(self) -> None:
        """Record the metrics of the whole step, which don't add up over its microbatches."""
        if self._loads:
            loads = sum(self._loads[1:], self._loads[0]).double()
            spread = loads.std(-1, correction=0) / loads.mean(-1)
            self.metrics.mean("moe/load_cv", spread.mean().item(), 1)
        if self.coefficient > 0:
            self.metrics.mean("loss/router_aux", 0.0, 1)

    def finish(self) -> None:
        """After the last update, record how many choices changed since before the first."""
        if not self.settings.measure_routing:
            return
        name, mean = "moe/experts_changed", self.metrics.mean
        for minibatch in filter(None, self._before):
            before, after = _choices(minibatch), _choices(self.preferred(minibatch))
            tokens, layers, k = before.shape
            changed = changed_slots(before, after)
            mean(name, int(changed.sum()), tokens * layers * k)
            for layer, count in enumerate(changed.sum(0).tolist()):
                mean(f"{name}_layer_{layer}", count, tokens * k)
            mean("moe/tokens_changed", int((changed > 0).any(-1).sum()), tokens)

    def preferred(self, trajectories: Sequence[TrajectorySamples]) -> list[TrajectorySamples]:
        """The same samples with the experts [L, N, K] that the routers prefer now."""

        def score(microbatch: Microbatch, samples: Sequence[Sample]) -> np.ndarray:
            with self.policy.routers.watch() as choices:
                self.policy.logprobs(microbatch)
            return choices.preferred().cpu().numpy()[microbatch.index.numpy()]

        return rescored(self.policy, trajectories, self.settings, "expert_choices", score)


def record_agreement(
    metrics: Metrics, engine: Integer[Tensor, "T N K"], trainer: Integer[Tensor, "T N K"]
) -> None:
    """Slots in which the engine took an expert that the trainer takes too; -1 is unknown."""
    chosen = (engine >= 0).all(-1).all(-1)
    engine, trainer = engine[chosen], trainer[chosen].to(engine.dtype)
    if engine.shape[2:] != trainer.shape[2:]:
        raise DataError(
            f"the engine chose {engine.shape[2]} experts per token, not {trainer.shape[2]}"
        )
    changed = int(changed_slots(engine, trainer).sum())
    metrics.mean("moe/routing_agreement", engine.numel() - changed, engine.numel())


def changed_slots(
    before: Integer[Tensor, "T N K"], after: Integer[Tensor, "T N K"]
) -> Int[Tensor, "T N"]:
    """How many of the experts in `before` are not among those in `after`, whatever their order.

    >>> changed_slots(torch.tensor([[[0, 3]]]), torch.tensor([[[3, 2]]]))
    tensor([[1]])
    """
    return (before[..., :, None] != after[..., None, :]).all(-1).sum(-1)


def _choices(trajectories: Sequence[TrajectorySamples]) -> Integer[Tensor, "U N K"]:
    """The expert choices of all samples, one after the other."""
    chosen = [sample.expert_choices for sample in flat(trajectories)]
    return torch.from_numpy(np.concatenate([c for c in chosen if c is not None]))
