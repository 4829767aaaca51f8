"""A rollout batch -> optimizer steps on the policy: the paper on one screen.

For each minibatch (GSPO, Zheng et al., arXiv 2507.18071; the objective is in objective/loss.py):

    N = sequences of the minibatch
    d_t = log pi_theta(y_t) - log pi_old(y_t)             for each sampled token
    l_i = (1/L_i) sum_t d_t,   s_i = exp(l_i)             for each sequence        equation 7
    loss = -(1/N) sum_i min(s_i A_i, clip(s_i) A_i)       over all microbatches    equation 5
    backward, clip the gradient to max_grad_norm, AdamW
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.core.errors import NumericsError
from gspo.core.metrics import Metrics
from gspo.data.packing import Microbatch, pack
from gspo.data.sample import TrajectorySamples, unit_count
from gspo.objective import Objective, policy_loss
from gspo.policy.load import Policy
from gspo.policy.moe import ExpertChoices
from gspo.policy.workers import Workers
from gspo.train.backward import backward_each
from gspo.train.budget import row_budget
from gspo.train.defaults import with_defaults
from gspo.train.epsilon import EpsilonController
from gspo.train.expert_replay import ExpertReplay, check_expert_options, shares
from gspo.train.minibatches import RolloutBatch, minibatches, why_no_update, with_gradient
from gspo.train.observe import Observer, Scored, Trace
from gspo.train.old_logprobs import with_trainer_logprobs
from gspo.train.optimizer import Optimizer, learning_rate
from gspo.train.settings import Settings

Reference = Callable[[Microbatch], Float[Tensor, " M"]]
"""Log-probs of the M sampled tokens of a microbatch under the model that a KL term refers to."""


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


class Trainer:
    """Owns the optimizer of a policy. `step` counts calls of `train` over the run's life."""

    def __init__(self, policy: Policy, load_reference: Callable[[], Policy] | None = None):
        self.policy = policy
        self.optimizer = Optimizer(policy.trainable)
        self.step = 0
        self.epsilon = EpsilonController()
        self._load_reference = load_reference
        self._frozen: Policy | None = None

    def train(self, batch: RolloutBatch, settings: Settings) -> TrainOutput:
        """Take `minibatches` x `epochs` optimizer steps and count the policy version up.

        A minibatch without a gradient is no step: AdamW's momentum alone must not move weights.
        That is one in which every advantage is 0, unless there is a KL term, which has a gradient
        there too.

        Raises:
            NumericsError: a loss, a gradient or a router logit that is not finite. The weights are
                those before that optimizer step.
            ConfigError, DataError: see `check_expert_options`.
        """
        settings = with_defaults(settings, self.policy)
        assert settings.learning_rate is not None
        check_expert_options(self.policy, batch.samples, settings)
        watch = Observer(self.policy, batch)
        objective = settings.objective
        if settings.auto_epsilon:
            objective = self.epsilon.apply(objective)
        self.policy.lm.eval()  # train mode is dropout and noise under any name: never wanted
        plan, experts = self._plan(batch, settings, watch.metrics)  # fixes pi_old
        try:
            for k, minibatch in enumerate(plan):
                if not self.gradient(minibatch, settings, objective, watch, experts):
                    watch.metrics.add("optim/skipped", 1)
                    continue
                begin, end = (self.step + i / len(plan) for i in (k, k + 1))
                rate = learning_rate(settings.learning_rate, settings, begin, end)
                norm = self.optimizer.step(rate, settings)  # clips to max_grad_norm
                watch.updated(norm, rate)
        except NumericsError as error:
            note = f"train step {self.step}: {error}; the update was not made"
            raise NumericsError(note) from None
        finally:
            self.optimizer.clear()  # the next call must not add to what came before a failure
            self.policy.version += watch.updates > 0  # the backend publishes these weights
        self.step += 1
        experts.finish()
        self.epsilon.learn(objective, settings, watch, self.step)
        watch.done(objective)
        skipped = None if watch.updates else why_no_update(len(batch.samples), batch.dropped)
        return TrainOutput(watch.updates, skipped, watch.metrics, settings, watch.by_trajectory())

    def gradient(
        self,
        minibatch: Sequence[TrajectorySamples],
        settings: Settings,
        objective: Objective,
        watch: Observer,
        experts: ExpertReplay,
    ) -> bool:
        """Leave the gradient of a minibatch's loss on the parameters; False if it has none.

        N and T are counted before the first backward pass, over all of the minibatch, so that
        nothing depends on how it is split into microbatches.
        """
        trained = with_gradient(minibatch, objective)
        if not trained:
            return False
        # N and T: those without a gradient count too.
        n = sum(unit_count(samples, settings.sequence_unit) for samples in minibatch)
        t = sum(int(sample.loss_mask.sum()) for samples in minibatch for sample in samples)
        on_policy = watch.on_policy(trained)
        microbatches = pack(
            [sample for samples in trained for sample in samples],
            self._budget(settings),
            settings.sequence_unit,
            share=shares(self.policy, settings),
            replay=experts.replays,
            workers=self.policy.workers.count,
        )
        experts.begin(microbatches, on_policy=on_policy)

        def loss_of(microbatch: Microbatch) -> tuple[Tensor, tuple[Scored, ExpertChoices]]:
            with experts.watch(microbatch) as choices:  # log pi_theta of the sampled tokens
                scored = self.policy.logprobs(microbatch, settings.logprob_calculation_chunk_size)
            out = policy_loss(
                scored.logprobs,
                microbatch.old_logprobs,
                microbatch.sequence_ids,
                microbatch.advantages,
                objective,
                loss_mask=microbatch.loss_mask,
                total_sequences=n,
                total_tokens=t,
                sampling_logprobs=microbatch.sampling_logprobs if objective.correction else None,
                reference_logprobs=self.reference(microbatch) if objective.kl_coef > 0 else None,
            )
            loss = out.loss + experts.coefficient * choices.balance
            return loss, (Scored.of(microbatch, scored, out, loss), choices)

        # A reference may be the policy itself with its adapters off, which is off for every thread.
        workers = Workers() if objective.kl_coef > 0 else self.policy.workers
        for scored, choices in backward_each(self.policy, microbatches, loss_of, workers):
            experts.record(scored.microbatch, choices)
            watch.saw(scored)
        experts.end()
        watch.backward_done(objective, on_policy=on_policy)
        return True

    def reference(self, microbatch: Microbatch) -> Float[Tensor, " M"]:
        """Log-probs of the frozen base model: LoRA's model without adapters, else a copy."""
        if self.policy.peft is None and self._frozen is None:
            assert self._load_reference is not None
            self._frozen = self._load_reference()
        with torch.no_grad():
            if self._frozen is not None:
                return self._frozen.logprobs(microbatch).logprobs
            with self.policy.reference():
                return self.policy.logprobs(microbatch).logprobs

    def _plan(
        self, batch: RolloutBatch, settings: Settings, metrics: Metrics
    ) -> tuple[list[list[TrajectorySamples]], ExpertReplay]:
        """The minibatches of all epochs, in order.

        What stays as it is over all updates is fixed here: the expert choices that are replayed,
        and the old log-probs, if the trainer is to make them.
        """
        budget = self._budget(settings)
        if not settings.counts_flat:
            batch = batch.with_signal()
        seeds = [_mix(settings.seed, self.step, epoch) for epoch in range(settings.epochs)]
        epochs = [minibatches(batch, settings.minibatches, seed) for seed in seeds]
        experts = ExpertReplay(self.policy, settings, metrics, budget)
        recorded = experts.start([with_gradient(m, settings.objective) for m in epochs[0]])
        fixed = [recorded.get(s[0].trajectory_id, s) for minibatch in epochs[0] for s in minibatch]
        if settings.old_logprobs == "trainer":
            fixed = with_trainer_logprobs(
                self.policy,
                fixed,
                budget,
                settings.logprob_calculation_chunk_size,
                replay=experts.replays,
                share=shares(self.policy, settings),
            )
        by_id = {samples[0].trajectory_id: samples for samples in fixed}
        plan = [[by_id[s[0].trajectory_id] for s in m] for epoch in epochs for m in epoch]
        return plan, experts

    def _budget(self, settings: Settings) -> int:
        config = self.policy.lm.config.get_text_config()
        return settings.packed_sequence_length or row_budget(config, self.policy.checkpointing)


def _mix(*numbers: int) -> int:
    """One seed of several numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % 2**63
    return seed
