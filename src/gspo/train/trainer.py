"""A rollout batch -> optimizer steps on the policy."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gspo.core.errors import NumericsError
from gspo.core.metrics import Metrics
from gspo.data.packing import PackedBatch
from gspo.data.sample import Sample, unit_count
from gspo.dev import TrainConfig
from gspo.objective import CLIPPING, Objective
from gspo.policy.policy import Policy
from gspo.train.budget import row_budget
from gspo.train.defaults import with_defaults
from gspo.train.epsilon import EpsilonController, is_noisy, noise_advice, spread
from gspo.train.expert_replay import BatchRouting, check_routing, shares, with_routes
from gspo.train.minibatches import (
    RolloutBatch,
    minibatches,
    reward_std,
    why_no_update,
    without_advantage,
)
from gspo.train.optimizer import Optimizer, learning_rate
from gspo.train.recompute import with_trainer_logprobs
from gspo.train.settings import Settings
from gspo.train.step import Reference, StepInput, accumulate
from gspo.train.trace import Trace, by_trajectory

log = logging.getLogger("gspo")


@dataclass(frozen=True)
class TrainOutput:
    """What a call of `Trainer.train` did.

    Attributes:
        updates: optimizer steps taken.
        skipped: why none was taken, or None.
        metrics: of the whole call.
        settings: those that were used, with the defaults that apply to the model.
        traces: of each trajectory that had a forward pass, its sequences in their last update.
    """

    updates: int
    skipped: str | None
    metrics: Metrics
    settings: Settings
    traces: Mapping[int, Sequence[Trace]]


class Trainer:
    """Owns the optimizer of a policy. `step` counts calls of `train` over the run's life."""

    def __init__(self, policy: Policy, load_reference: Callable[[], Policy] | None = None):
        self.policy = policy
        self.optimizer = Optimizer(policy.trainable)
        self.step = 0
        self.epsilon = EpsilonController()
        self._load_reference = load_reference
        self._told: set[int] = set()
        self._frozen: Policy | None = None

    def train(self, batch: RolloutBatch, settings: Settings) -> TrainOutput:
        """Take `minibatches` x `epochs` optimizer steps and count the policy version up.

        A minibatch without a gradient is no step: AdamW's momentum alone must not move weights.
        That is one in which every advantage is 0, unless there is a KL term, which has a gradient
        there too.

        Raises:
            NumericsError: a loss, a gradient or a router logit that is not finite. The weights are
                those before that step.
            ConfigError, DataError: see `check_routing`.
        """
        settings = with_defaults(settings, self.policy)
        assert settings.learning_rate is not None
        check_routing(self.policy, batch.samples, settings.options)
        started = time.perf_counter()
        metrics = Metrics()
        self._describe(metrics, batch)
        objective = settings.objective
        if settings.auto_epsilon:
            objective = self.epsilon.apply(objective)
        plan, routing = self._routed(self._plan(batch, settings), settings, metrics)
        plan = self._against_trainer(plan, settings)
        seen: list[Trace] = []
        updates = 0
        self.policy.lm.eval()  # train mode is dropout and noise under any name: never wanted
        try:
            for at, part in enumerate(plan):
                stepped = self._minibatch(
                    part,
                    settings,
                    objective,
                    metrics,
                    routing,
                    rate=learning_rate(
                        settings.learning_rate,
                        settings.options,
                        begin=self.step + at / len(plan),
                        end=self.step + (at + 1) / len(plan),
                    ),
                    update=updates,
                )
                updates += stepped is not None
                seen += stepped or []
        finally:
            self.policy.version += updates > 0
        routing.end()
        self.step += 1
        skipped = why_no_update(len(batch.samples), batch.dropped) if updates == 0 else None
        self._calibrate(metrics, objective, settings, seen)
        metrics.add("optim/updates", updates)
        metrics.add("time/train", time.perf_counter() - started)
        return TrainOutput(updates, skipped, metrics, settings, by_trajectory(seen))

    def _plan(self, batch: RolloutBatch, settings: Settings) -> list[list[tuple[Sample, ...]]]:
        """The minibatches of all epochs, in order."""
        options = settings.options
        if not settings.counts_flat:
            batch = batch.with_signal()
        seeds = [_mix(options.seed, self.step, epoch) for epoch in range(options.epochs)]
        return [part for seed in seeds for part in minibatches(batch, settings.minibatches, seed)]

    def _routed(
        self, plan: list[list[tuple[Sample, ...]]], settings: Settings, metrics: Metrics
    ) -> tuple[list[list[tuple[Sample, ...]]], BatchRouting]:
        """The plan with the routes to be replayed; recorded on one epoch, which has all samples."""
        options = settings.options
        routing = BatchRouting(self.policy, options, metrics, self._budget(options))
        epoch = plan[: len(plan) // options.epochs]
        routes = routing.start([_wanted(part, settings) for part in epoch])
        return [[with_routes(own, routes) for own in part] for part in plan], routing

    def _against_trainer(
        self, plan: list[list[tuple[Sample, ...]]], settings: Settings
    ) -> list[list[tuple[Sample, ...]]]:
        """The plan with pi_old as the trainer's, where asked: fixed before the first update."""
        options = settings.options
        if settings.old_logprobs != "trainer":
            return plan
        epoch = [own for part in plan[: len(plan) // options.epochs] for own in part]
        scored = with_trainer_logprobs(
            self.policy,
            epoch,
            self._budget(options),
            options.logprob_calculation_chunk_size,
            replay=options.routing_replay != "none",
            share=shares(self.policy, options),
        )
        found = {own[0].trajectory_id: own for own in scored}
        return [[found[own[0].trajectory_id] for own in part] for part in plan]

    def _minibatch(
        self,
        part: Sequence[tuple[Sample, ...]],
        settings: Settings,
        objective: Objective,
        metrics: Metrics,
        routing: BatchRouting,
        *,
        rate: float,
        update: int,
    ) -> list[Trace] | None:
        """One optimizer step, or None where nothing in the minibatch has a gradient."""
        options = settings.options
        wanted = _wanted(part, settings)
        if not wanted:
            metrics.add("optim/skipped", 1)
            return None
        on_policy = update == 0 and self._fresh(wanted)
        work = StepInput(
            samples=[sample for samples in wanted for sample in samples],
            total_sequences=sum(unit_count(samples, options.sequence_unit) for samples in part),
            total_tokens=sum(int(s.loss_mask.sum()) for samples in part for s in samples),
            unit=options.sequence_unit,
            share=shares(self.policy, options),
            budget=self._budget(options),
            chunk=options.logprob_calculation_chunk_size,
            update=update,
            on_policy=on_policy,
            routing=routing.step(on_policy=on_policy),
        )
        reference = self.reference() if objective.kl_coef > 0 else None
        try:
            seen = accumulate(self.policy, work, objective, metrics, reference)
        except BaseException as error:
            self.optimizer.clear()  # else the next step would add to what came before the failure
            if isinstance(error, NumericsError):
                note = f"train step {self.step}: {error}; the update was not made"
                raise NumericsError(note) from None
            raise
        try:
            norm = self.optimizer.step(rate, options)
        except FloatingPointError as error:
            raise NumericsError(
                f"train step {self.step}: {error}; the update was not made. "
                "Lower the learning rate, or look at the batch's ratio/log_abs_max"
            ) from None
        metrics.mean("optim/grad_norm", norm, 1)
        metrics.mean("optim/learning_rate", rate, 1)
        return seen

    def _calibrate(
        self, metrics: Metrics, objective: Objective, settings: Settings, seen: list[Trace]
    ) -> None:
        """Steer the clip range where asked; say once where it doesn't fit: as a warning if it is
        noise that clips, else as information (most short runs at the paper's range learn)."""
        target = settings.options.epsilon_target
        if settings.auto_epsilon:
            self.epsilon.observe(objective, seen, target)
        if objective.surrogate in CLIPPING:
            metrics.mean("ratio/epsilon_low", objective.epsilon_low, 1)
            metrics.mean("ratio/epsilon_high", objective.epsilon_high, 1)
        if settings.auto_epsilon or objective.level not in ("sequence", "sequence_token"):
            return
        noise = metrics.compute().get("mismatch/clip_fraction", 0.0)
        if settings.old_logprobs == "trainer":  # the ratio is not taken against the engine
            noise = 0.0
        advice = noise_advice(noise, spread(objective, seen), objective.epsilon_low, target)
        level = logging.WARNING if is_noisy(noise, target) else logging.INFO
        if advice is not None and level not in self._told:
            self._told.add(level)
            log.log(level, "train step %d: %s", self.step, advice)

    def _fresh(self, trajectories: Sequence[Sequence[Sample]]) -> bool:
        """Whether the current weights sampled every token."""
        versions = (s.policy_versions[s.ratio_mask] for own in trajectories for s in own)
        return all((own == self.policy.version).all() for own in versions)

    def _budget(self, options: TrainConfig) -> int:
        config = self.policy.lm.config.get_text_config()
        return options.packed_sequence_length or row_budget(config, self.policy.checkpointing)

    def _describe(self, metrics: Metrics, batch: RolloutBatch) -> None:
        """What is known of the batch before any forward pass."""
        by_group: dict[int, list[float]] = {}
        for group, reward in zip(batch.groups, batch.rewards, strict=True):
            by_group.setdefault(group, []).append(reward)
        for own in by_group.values():
            metrics.mean("train/reward_std", reward_std(own), 1)
        count = len(batch.samples)
        metrics.mean("train/reward", math.fsum(batch.rewards), count)
        every = [sample for samples in batch.samples for sample in samples]
        if every:
            versions = np.concatenate([sample.policy_versions for sample in every])
            sampled = int(np.concatenate([sample.ratio_mask for sample in every]).sum())
            metrics.mean("tokens/completion_mean", sampled, count)
            metrics.add("tokens/completion", sampled)
            metrics.add("tokens/prompt", len(versions) - sampled)
            age = self.policy.version - versions[versions >= 0]
            if len(age):
                metrics.mean("staleness/mean", float(age.sum()), len(age))
                metrics.maximum("staleness/max", float(age.max()))
        metrics.add("train/groups_zero_advantage", batch.flat_groups)
        metrics.add("train/trajectories", len(batch.samples))
        metrics.add("train/trajectories_too_long", batch.dropped)

    def reference(self) -> Reference:
        """Log-probs of the frozen base model: LoRA's model without adapters, else a copy."""
        if self.policy.peft is None and self._frozen is None:
            assert self._load_reference is not None
            self._frozen = self._load_reference()

        def score(batch: PackedBatch) -> Float[Tensor, " M"]:
            with torch.no_grad():
                if self._frozen is not None:
                    return self._frozen.logprobs(batch).logprobs
                with self.policy.reference():
                    return self.policy.logprobs(batch).logprobs

        return score


def _wanted(part: Sequence[tuple[Sample, ...]], settings: Settings) -> list[tuple[Sample, ...]]:
    """The trajectories that have a gradient: those with an advantage, or all with a KL term."""
    return [s for s in part if settings.objective.kl_coef > 0 or not without_advantage(s)]


def _mix(*numbers: int) -> int:
    """One seed of several numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % 2**63
    return seed
