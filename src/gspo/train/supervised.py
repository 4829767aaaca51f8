"""Supervised fine-tuning: the policy learns to write given answers, token by token.

    loss = -(1/T) sum_t log pi_theta(y_t)      over the T trained tokens of a batch

T is counted over the whole batch before the first backward pass, so that nothing depends on how it
is split into microbatches. Log-probs, packing and optimizer are those of `Trainer`.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence

from torch import Tensor

from gspo.config import TrainSFTConfig
from gspo.core.draws import seed_of
from gspo.core.errors import ConfigError, NumericsError
from gspo.core.metrics import Metrics
from gspo.data.packing import Microbatch
from gspo.data.sample import Sample
from gspo.dev import TrainConfig
from gspo.policy.policy import Policy
from gspo.train.backward import backward_each
from gspo.train.defaults import base_parameters, default_learning_rate
from gspo.train.minibatches import microbatches
from gspo.train.optimizer import learning_rate
from gspo.train.settings import Settings, resolve
from gspo.train.trainer import Trainer

SFTPlan = list[tuple[float, list[int]]]
"""Of each optimizer step of one call: its learning rate, and the numbers of its samples."""


def plan_sft(count: int, config: TrainSFTConfig, policy: Policy) -> SFTPlan:
    """Divide `count` samples into the batches of all epochs.

    Raises:
        ConfigError: a list of learning rates that is not one for each batch.
    """
    batches: list[list[int]] = []
    for epoch in range(config.epochs):
        order = list(range(count))
        if config.seed is not None:
            random.Random(seed_of(config.seed, "sft", epoch)).shuffle(order)
        batches += [order[i : i + config.batch_size] for i in range(0, count, config.batch_size)]
    steps, peak = len(batches), config.learning_rate
    if isinstance(peak, list):
        if len(peak) != steps:
            raise ConfigError(
                f"TrainSFTConfig: learning_rate has {len(peak)} numbers, but {count} trajectories "
                f"make {steps} batches: give one number, or one for each batch"
            )
        return list(zip(peak, batches, strict=True))
    peak = peak or default_learning_rate(base_parameters(policy), policy.peft is not None)
    schedule = TrainConfig()
    if config.lr_schedule == "linear":
        warmup = steps // 10
        schedule = TrainConfig(lr_schedule="linear", lr_warmup_steps=warmup, lr_total_steps=steps)
    return [(learning_rate(peak, schedule, k, k + 1), batch) for k, batch in enumerate(batches)]


def train_sft(trainer: Trainer, samples: Sequence[Sample], plan: SFTPlan) -> Metrics:
    """Take the optimizer steps of the plan: one step of the run, and one policy version.

    Raises:
        NumericsError: a gradient that is not finite. The weights are those before that batch.
    """
    policy, settings, metrics, losses = trainer.policy, resolve(), Metrics(), []
    started = time.perf_counter()
    policy.use_threads()
    policy.lm.eval()  # train mode is dropout and noise under any name: never wanted
    try:
        for rate, batch in plan:
            loss, tokens = sft_gradient(policy, [samples[i] for i in batch], settings)
            norm = trainer.optimizer.step(rate, settings)
            losses.append(loss)
            metrics.mean("sft/loss", loss * tokens, tokens)
            metrics.add("sft/tokens", tokens)
            metrics.mean("sft/grad_norm", norm, 1)
    except NumericsError as error:
        note = f"SFT in step {trainer.step}, batch {len(losses)}: {error}; its update was not made"
        raise NumericsError(note) from None
    finally:
        trainer.optimizer.clear()
        policy.version += bool(losses)  # the backend publishes these weights
    trainer.step += 1
    metrics.add("sft/loss_first", losses[0])
    metrics.add("sft/loss_last", losses[-1])
    metrics.add("sft/batches", len(losses))
    metrics.maximum("sft/learning_rate", max(rate for rate, _ in plan))
    metrics.add("time/train", time.perf_counter() - started)
    return metrics


def sft_gradient(
    policy: Policy, samples: Sequence[Sample], settings: Settings
) -> tuple[float, int]:
    """Compute the gradient of a batch's loss, in `.grad`; return the loss and T."""
    total = sum(sample.sampled for sample in samples)

    def forward(microbatch: Microbatch) -> tuple[Tensor, float]:
        scored = policy.logprobs(microbatch, settings.logprob_calculation_chunk_size)
        loss = -scored.logprobs.sum() / total
        return loss, loss.item()

    packed = microbatches(policy, [(sample,) for sample in samples], settings, replay=False)
    return math.fsum(backward_each(policy, packed, forward, policy.workers)), total
