"""`gspo inspect`: what would each method have done with a rollout batch that a run has stored?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from gspo.backend.stored_batch import UpdateRecord
from gspo.core.errors import ConfigError
from gspo.core.metrics import Metrics
from gspo.core.options import Options
from gspo.data.sample import Sample
from gspo.dev import Algorithm
from gspo.lab.audit_report import summarise
from gspo.lab.gradients import MethodLoss, cosines, measure
from gspo.lab.inspect_report import AtWeights, Inspection, Method
from gspo.lab.stored_step import StoredStep, Weights
from gspo.objective import PRESETS
from gspo.policy.load import Policy
from gspo.train.budget import token_budget
from gspo.train.expert_replay import ExpertReplay
from gspo.train.minibatches import RolloutBatch, prepare
from gspo.train.old_logprobs import with_trainer_logprobs
from gspo.train.settings import Settings

OWN = "this run"
"""Name of the run's own method if no preset equals it."""
_METHOD = (
    "algorithm",
    "importance_sampling_level",
    "epsilon",
    "epsilon_high",
    "epsilon_scale",
    "scale_rewards",
    "correction",
    "correction_low",
    "correction_high",
)
"""Options that belong to the method: another preset has its own. The rest stays the run's."""


class InspectSpec(Options):
    """What is inspected."""

    run: Path
    """Folder of the run."""
    step: int | None = Field(default=None, ge=1)
    """Call of `train` whose batch is taken. None: the last one."""
    weights: Literal["before", "after", "both"] = "both"
    """`before`: those that the step's first update started from; `after`: those it ended with."""
    presets: tuple[Algorithm, ...] | None = None
    """None: all. The run's own method is always there."""


def inspect_run(spec: InspectSpec) -> Inspection:
    """Loss, gradient, clipping and the gradients' cosines of each method on a stored batch.

    Raises:
        RunError: no such run or step, or the weights are no longer on disk.
        ConfigError: too many presets for the memory.
    """
    step = StoredStep(spec.run, spec.step)
    own = step.settings()
    names: tuple[Weights, ...] = ("before", "after")
    chosen = names if spec.weights == "both" else (spec.weights,)
    # Whether training fixed something by the weights before the step.
    by_trainer = own.routing_replay == "old_policy" or own.old_logprobs == "trainer"
    step.check_weights(chosen, needs_before=by_trainer)
    methods = make_methods(step.record, own, spec.presets)
    batches = {s.advantage: _batch(step, s) for s in methods.values()}
    batch = batches[own.advantage]
    samples = batch.samples
    if by_trainer:
        samples = as_trained(step.load("before"), samples, own)
    at = []
    for name in chosen:
        policy = step.load(name)
        losses = {n: MethodLoss.of(batches[s.advantage], s) for n, s in methods.items()}
        _check_memory(policy, len(losses))
        reference = step.reference(policy) if own.objective.kl_coef > 0 else None
        products = measure(policy, samples, losses, own, _budget(policy), reference)
        at.append(_at(name, step.weights_of(name), losses, products))
    balance = own.router_aux_loss_coef
    return Inspection(
        run=str(spec.run),
        step=step.number,
        own=next(iter(methods)),
        options=own.model_dump(mode="json", exclude_unset=True),
        trajectories=len(batch.samples),
        dropped=batch.dropped,
        groups=len(set(batch.groups)),
        flat_groups=batch.flat_groups,
        trained=sum(of_trajectory[0].advantage != 0 for of_trajectory in batch.samples),
        tokens=sum(s.sampled for of_trajectory in batch.samples for s in of_trajectory),
        left_out=(f"router_aux_loss_coef={balance:g}",) if balance else (),
        at=tuple(at),
    )


def _at(
    weights: Weights, source: str, losses: Mapping[str, MethodLoss], products: Float[Tensor, "P P"]
) -> AtWeights:
    matrix, norms = cosines(products), products.diag().sqrt().tolist()
    methods = [
        _method(name, loss, norm, row[0])
        for (name, loss), norm, row in zip(losses.items(), norms, matrix, strict=True)
    ]
    log_ratios = next(iter(losses.values())).log_ratios
    summary = summarise(np.array(log_ratios)) if log_ratios else None
    return AtWeights(weights, source, summary, tuple(methods), matrix)


def _method(name: str, loss: MethodLoss, norm: float, cosine: float | None) -> Method:
    objective = loss.settings.objective
    ranged = objective.has_range
    return Method(
        name=name,
        epsilon=(objective.epsilon_low, objective.epsilon_high) if ranged else None,
        sequences=loss.sequences,
        loss=loss.policy,
        kl=loss.kl,
        grad_norm=norm,
        clip_fraction=loss.clipped / max(loss.scored, 1),
        clip_fraction_tokens=loss.clipped_tokens / max(loss.scored_tokens, 1),
        cosine=cosine,
    )


def make_methods(
    record: UpdateRecord, own: Settings, presets: tuple[Algorithm, ...] | None = None
) -> dict[str, Settings]:
    """The run's own method first, then the presets with their own defaults.

    What doesn't belong to a method (KL, old log-probs, what a sequence is, ...) stays the run's.
    """

    def method(settings: Settings) -> tuple[object, ...]:
        return settings.objective, settings.advantage, settings.preset.counts_flat

    dropped = dict.fromkeys(_METHOD)
    by_name = {name: record.settings(**dropped | {"algorithm": name}) for name in PRESETS}
    own_name = next((n for n, s in by_name.items() if method(s) == method(own)), OWN)
    return {own_name: own} | {
        name: settings
        for name, settings in by_name.items()
        if name != own_name and (presets is None or name in presets)
    }


def as_trained(
    policy: Policy, trajectories: Sequence[tuple[Sample, ...]], settings: Settings
) -> Sequence[tuple[Sample, ...]]:
    """The samples with what the trainer fixes before its first update: expert choices, pi_old."""
    budget = _budget(policy)
    with torch.no_grad():
        recorded = ExpertReplay(policy, settings, Metrics(), budget).start([trajectories])
    trajectories = [recorded.get(samples[0].trajectory_id, samples) for samples in trajectories]
    if settings.old_logprobs != "trainer":
        return trajectories
    replay = settings.routing_replay != "none"
    return with_trainer_logprobs(policy, trajectories, budget, None, replay=replay)


def _batch(step: StoredStep, settings: Settings) -> RolloutBatch:
    return prepare(
        step.groups,
        context=step.record.context,
        advantage=settings.advantage,
        overlong=settings.overlong,
        drop_too_long=settings.on_too_long == "drop",
    )


def _budget(policy: Policy) -> int:
    return token_budget(policy.lm.config.get_text_config(), checkpointing=False)


def _check_memory(policy: Policy, methods: int) -> None:
    """Refuse more float32 gradients than fit, before the work."""
    free = free_memory(policy.device)
    size = 4 * sum(p.numel() for p in policy.trainable.values())
    if free is not None and methods * size > free:
        fit = max(free // size, 1)
        raise ConfigError(
            f"{methods} gradients of {size / 2**20:,.0f} MiB each don't fit the "
            f"{free / 2**20:,.0f} MiB that are free: name at most {fit} methods with --presets, "
            "the run's own included"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had; None if the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else None
