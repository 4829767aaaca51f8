"""A rollout batch -> optimizer steps on the policy: the paper on one screen.

For each minibatch (GSPO, Zheng et al., arXiv 2507.18071; the objective is in objective/loss.py):

    N = sequences of the minibatch
    d_t = log pi_theta(y_t) - log pi_old(y_t)             for each sampled token
    l_i = (1/L_i) sum_t d_t,   s_i = exp(l_i)             for each sequence        equation 7
    loss = -(1/N) sum_i min(s_i A_i, clip(s_i) A_i)       over all microbatches    equation 5
    backward, clip the gradient to max_grad_norm, AdamW
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.core.errors import NumericsError
from gspo.core.metrics import Metrics
from gspo.data.packing import Microbatch
from gspo.data.sample import TrajectorySamples, flat, unit_count
from gspo.objective import LossOutput, policy_loss
from gspo.policy.moe import ExpertChoices
from gspo.policy.policy import Policy
from gspo.policy.workers import Workers
from gspo.train import minibatches as plan
from gspo.train.backward import backward_each
from gspo.train.batch_metrics import warn_of_altered, warn_of_unread
from gspo.train.bit_equality import check_exact
from gspo.train.defaults import with_defaults
from gspo.train.epsilon import EpsilonController
from gspo.train.expert_replay import ExpertReplay
from gspo.train.observe import Observer, Scored, Trace
from gspo.train.optimizer import Optimizer, learning_rate
from gspo.train.settings import Settings


@dataclass(frozen=True)
class TrainOutput:
    """What a call of `Trainer.train` did.

    Attributes:
        updates: optimizer steps taken.
        skipped: why none was taken, or None.
        metrics: of the whole call.
        settings: those that were used, with the defaults that apply to the model.
        traces: by trajectory, for each that had a forward pass: its sequences in their last update.
    """

    updates: int
    skipped: str | None
    metrics: Metrics
    settings: Settings
    traces: Mapping[int, Sequence[Trace]]


@dataclass(frozen=True)
class Call:
    """What stays the same over the optimizer steps of one call of `Trainer.train`.

    Attributes:
        settings: with the defaults that apply to the model, and the clip range of this call.
        minibatches: those of all epochs, in order; their expert choices and pi_old are fixed.
        experts: replays expert choices.
        observer: gathers metrics and traces.
    """

    settings: Settings
    minibatches: Sequence[Sequence[TrajectorySamples]]
    experts: ExpertReplay
    observer: Observer


class Trainer:
    """Trains a policy: owns its optimizer, and rounds its weights to its `dtype`. `step` counts
    calls of `train` over the run's life."""

    def __init__(
        self, policy: Policy, load_reference: Callable[[str | None], Policy] | None = None
    ):
        self.policy = policy
        self.optimizer = Optimizer(policy.trainable, policy.round_weights())
        self.step = 0
        self.epsilon = EpsilonController()
        self._load_reference = load_reference and lru_cache(maxsize=1)(load_reference)
        self._warned: set[str] = set()

    def train(self, batch: plan.RolloutBatch, settings: Settings) -> TrainOutput:
        """Take `minibatches` x `epochs` optimizer steps, and increase the policy version by 1.

        A minibatch without a gradient is no step: AdamW's momentum by itself must not move weights.
        That is one in which each advantage is 0, unless there is a KL term, which has a gradient
        there too.

        Raises:
            NumericsError: a loss, a gradient or a router logit that is not finite. The weights are
                those before that optimizer step.
            ConfigError, DataError: see `ExpertReplay.check`.
        """
        self.policy.use_threads()
        call = self._begin(batch, settings)  # refuses what cannot be done, then fixes pi_old
        with self._updating(call):
            for k, minibatch in enumerate(call.minibatches):
                if self.gradient(minibatch, call):
                    rate = self._rate(call, k)
                    norm = self.optimizer.step(rate, call.settings)  # clips to max_grad_norm, AdamW
                    call.observer.updated(norm, rate)
        return self._end(batch, call)

    def gradient(self, minibatch: Sequence[TrajectorySamples], call: Call) -> bool:
        """Compute the gradient of a minibatch's loss, in `.grad`; False if it has none.

        N and T are counted before the first backward pass, over all of the minibatch, so that
        nothing depends on how it is split into microbatches.
        """
        settings, experts, observer = call.settings, call.experts, call.observer
        objective = settings.objective
        trained = plan.with_gradient(minibatch, objective)
        if not trained:
            observer.metrics.add("optim/skipped", 1)
            return False
        # N and T: trajectories without a gradient count too.
        n = sum(unit_count(samples, settings.sequence_unit) for samples in minibatch)
        t = sum(sample.sampled for sample in flat(minibatch))
        on_policy = observer.on_policy(trained)
        microbatches = plan.microbatches(self.policy, trained, settings, replay=experts.replays)
        experts.begin(microbatches, on_policy=on_policy)

        def forward(microbatch: Microbatch) -> tuple[Tensor, tuple[Any, ...]]:
            return self.loss(microbatch, call, n, t, exact=on_policy and self.policy.exact)

        # A reference may be the policy itself with its adapters off, which is off for all threads.
        threaded = self.policy.workers.threads > 1
        workers = Workers() if threaded and objective.kl_coef > 0 else self.policy.workers
        scored: list[Scored] = []
        results = backward_each(self.policy, microbatches, forward, workers)
        for microbatch, (*result, choices) in zip(microbatches, results, strict=True):
            experts.record(microbatch, choices)
            scored.append(Scored(microbatch, *result))
        experts.end()
        observer.record(scored, objective, on_policy=on_policy)
        return True

    def loss(
        self,
        microbatch: Microbatch,
        call: Call,
        total_sequences: int,
        total_tokens: int,
        *,
        exact: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, LossOutput, ExpertChoices]]:
        """The microbatch's part of the minibatch's loss (they add up), and what is reported of it:
        the rest of `Scored`, and its expert choices.

        Args:
            total_sequences, total_tokens: N and T of the whole minibatch.
            exact: refuse log-probs that are not the engine's, to the bit.
        """
        settings, objective = call.settings, call.settings.objective
        parts = self.policy.workers.parts
        with call.experts.watch(microbatch) as choices:  # log pi_theta of the sampled tokens
            chunk = settings.logprob_calculation_chunk_size
            scored = self.policy.logprobs(microbatch, chunk, part_only=True)
        if exact:
            check_exact(scored.logprobs, microbatch)
        of_tokens = microbatch.token_advantages  # A_ik, if turns have advantages of their own
        out = policy_loss(
            scored.logprobs,
            microbatch.old_logprobs,
            microbatch.sequence_ids,
            microbatch.advantages if of_tokens is None else None,
            objective,
            token_advantages=of_tokens,
            ratio_mask=parts.holds(microbatch.sources, microbatch.token_count),
            total_sequences=total_sequences,
            total_tokens=total_tokens,
            sampling_logprobs=microbatch.sampling_logprobs if objective.correction else None,
            reference_logprobs=self.reference(microbatch, settings) if objective.kl_coef else None,
            sequence_count=None if of_tokens is None else len(microbatch.advantages),
            sum_parts=parts.sum if parts.size > 1 else None,  # of l_i, L_i and all others
        )
        loss = out.loss + call.experts.coefficient * choices.balance
        # Detached: else the graph of each microbatch would live until the end of the step.
        out = replace(out, loss=loss.detach())
        whole = parts.sum(scored.logprobs.detach()), parts.sum(scored.entropy)
        return loss, (*whole, out, choices)

    def reference(self, microbatch: Microbatch, settings: Settings) -> Float[Tensor, " M"]:
        """Log-probs of the frozen model that the KL term is against."""
        frozen = self._frozen(settings.kl_reference)
        with torch.no_grad(), nullcontext() if frozen else self.policy.reference():
            return (frozen or self.policy).logprobs(microbatch).logprobs

    def _frozen(self, name: str | None) -> Policy | None:
        """The reference of this name. None: the base model; with LoRA the policy itself is it."""
        if name is None and self.policy.peft is not None:
            return None
        assert self._load_reference is not None
        return self._load_reference(name)

    def _begin(self, batch: plan.RolloutBatch, settings: Settings) -> Call:
        """Fix what stays the same over all updates: settings, minibatches, experts and pi_old."""
        settings = with_defaults(settings, self.policy)
        if settings.epsilon == "auto":
            settings = settings.with_objective(self.epsilon.apply(settings.objective))
        observer = Observer(self.policy, batch)
        experts = ExpertReplay(self.policy, settings, observer.metrics)
        experts.check(batch.samples)
        warn_of_altered(batch, self._warned)
        warn_of_unread(batch, settings, self._warned)
        if settings.objective.kl_coef > 0:
            self._frozen(settings.kl_reference)  # loaded before any work
        self.policy.lm.eval()  # train mode is dropout and noise under any name: never wanted
        if not settings.preset.counts_flat:
            batch = batch.with_signal()
        seeds = [_mix(settings.seed, self.step, epoch) for epoch in range(settings.epochs)]
        epochs = [plan.minibatches(batch, settings.minibatches, seed) for seed in seeds]
        fixed = experts.fixed(epochs[0])
        by_id = {samples[0].trajectory_id: samples for samples in fixed}
        minibatches = [[by_id[s[0].trajectory_id] for s in m] for m in chain(*epochs)]
        return Call(settings, minibatches, experts, observer)

    @contextmanager
    def _updating(self, call: Call) -> Iterator[None]:
        """Around the updates: clear gradients and set the version, also after a failure."""
        try:
            yield
        except NumericsError as error:
            note = f"train step {self.step}: {error}; the update was not made"
            raise NumericsError(note) from None
        finally:
            self.optimizer.clear()  # the next call must not add to what came before a failure
            self.policy.version += call.observer.updates > 0  # the backend publishes these weights

    def _rate(self, call: Call, k: int) -> float:
        """The learning rate of the k-th minibatch of a call, by the schedule of the run."""
        begin, end = (self.step + i / len(call.minibatches) for i in (k, k + 1))
        assert call.settings.learning_rate is not None  # `with_defaults` filled it in
        return learning_rate(call.settings.learning_rate, call.settings, begin, end)

    def _end(self, batch: plan.RolloutBatch, call: Call) -> TrainOutput:
        """What the call did; the clip range learns from it."""
        observer, settings = call.observer, call.settings
        call.experts.finish()  # a forward pass, which may fail: only after it the step is made
        self.step += 1
        self.epsilon.learn(settings, observer, self.step)
        observer.done(settings.objective)
        updates, metrics = observer.updates, observer.metrics
        left = len(batch.samples), batch.dropped, batch.stale
        skipped = None if updates else plan.why_no_update(*left)
        return TrainOutput(updates, skipped, metrics, settings, observer.by_trajectory())


def _mix(*numbers: int) -> int:
    """One seed of several numbers."""
    return reduce(lambda seed, number: (seed * 1_000_003 + number) % 2**63, numbers, 0)
