"""`gspo inspect`: what would each method have done with a rollout batch that a run has stored?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from gspo.backend.replay import StoredBatch, UpdateRecord
from gspo.core.errors import ConfigError
from gspo.core.metrics import Metrics
from gspo.core.options import Options
from gspo.data.packing import pack
from gspo.data.sample import Sample
from gspo.dev import Algorithm
from gspo.lab.gradients import MethodLoss, accumulate_gradients
from gspo.lab.inspection_report import Inspection, make_report
from gspo.lab.inspection_source import Source, Weights
from gspo.objective import PRESETS
from gspo.policy.policy import Policy
from gspo.train.budget import row_budget
from gspo.train.expert_replay import BatchRouting, with_routes
from gspo.train.minibatches import RolloutBatch, prepare
from gspo.train.recompute import with_trainer_logprobs
from gspo.train.settings import Settings
from gspo.train.step import Reference

OWN = "this run"
"""Name of the run's own method where no preset equals it."""
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
    """What is inspected.

    >>> InspectSpec(run=Path(".gspo/demo/sort-1"), step=3).chosen()
    ('before', 'after')
    """

    run: Path
    """Folder of the run."""
    step: int | None = Field(default=None, ge=1)
    """Call of `train` whose batch is taken. None: the last one."""
    weights: Literal["before", "after", "both"] = "both"
    """`before`: those that the step's first update started from; `after`: those it ended with."""
    presets: tuple[Algorithm, ...] | None = None
    """None: all. The run's own method is always there."""

    def chosen(self) -> tuple[Weights, ...]:
        """The weights, one by one."""
        return ("before", "after") if self.weights == "both" else (self.weights,)


def inspect_run(spec: InspectSpec) -> Inspection:
    """Loss, gradient, clipping and the gradients' cosines of each method on a stored batch.

    The run is only read, and may be training meanwhile.

    Raises:
        RunError: no such run or step, or the weights are no longer on disk.
        ConfigError: too many presets for the memory.
    """
    source = Source(spec.run)
    step = source.step(spec.step)
    batch = source.read(step)
    own = source.own_settings(batch.record, step)
    source.check_weights(step, spec.chosen(), needs_before=_uses_the_trainer(own))
    methods = make_methods(batch.record, own, spec.presets)
    kinds = {s.advantage: _prepare(batch, s) for s in methods.values()}

    trajectories = kinds[own.advantage].samples
    if _uses_the_trainer(own):
        trajectories = as_trained(source.load(step, "before", batch.record), trajectories, own)
    measured = []
    for weights in spec.chosen():
        policy = source.load(step, weights, batch.record)
        losses = {n: MethodLoss.of(kinds[s.advantage], s) for n, s in methods.items()}
        _check_memory(policy, len(losses))
        reference = source.reference(policy) if own.objective.kl_coef > 0 else None
        gram = measure(policy, trajectories, losses, own, reference)
        measured.append((weights, source.weights_of(step, weights), losses, gram))
    return make_report(spec.run, step, own, kinds[own.advantage], measured)


def measure(
    policy: Policy,
    trajectories: Sequence[tuple[Sample, ...]],
    losses: Mapping[str, MethodLoss],
    own: Settings,
    reference: Reference | None = None,
) -> Float[Tensor, "P P"]:
    """Run the methods over the batch as one optimizer step; dot products of their gradients.

    Trajectories in which no method finds a gradient are left out, as in training.
    """
    wanted = [t for t in trajectories if any(m.wants(t[0].trajectory_id) for m in losses.values())]
    options = own.options
    return accumulate_gradients(
        policy,
        pack([s for t in wanted for s in t], _budget(policy), options.sequence_unit),
        losses,
        chunk=options.logprob_calculation_chunk_size,
        replay=options.routing_replay != "none",
        reference=reference,
    )


def make_methods(
    record: UpdateRecord, own: Settings, presets: tuple[Algorithm, ...] | None = None
) -> dict[str, Settings]:
    """The run's own method first, then the presets with their own defaults.

    What doesn't belong to a method (KL, old log-probs, what a sequence is, ...) stays the run's.
    """
    drop = dict.fromkeys(_METHOD)
    known = {name: record.settings(**drop | {"algorithm": name}) for name in PRESETS}
    same = (n for n, s in known.items() if _method(s) == _method(own))
    name = next(same, OWN)
    wanted = {n: s for n, s in known.items() if presets is None or n in presets}
    return {name: own} | {n: s for n, s in wanted.items() if n != name}


def as_trained(
    policy: Policy, trajectories: Sequence[tuple[Sample, ...]], settings: Settings
) -> Sequence[tuple[Sample, ...]]:
    """The samples with what the trainer fixes before its first update: its routes, its pi_old."""
    options = settings.options
    budget = _budget(policy)
    with torch.no_grad():
        routes = BatchRouting(policy, options, Metrics(), budget).start([trajectories])
    trajectories = [with_routes(own, routes) for own in trajectories]
    if settings.old_logprobs != "trainer":
        return trajectories
    replay = options.routing_replay != "none"
    return with_trainer_logprobs(policy, trajectories, budget, None, replay=replay)


def _uses_the_trainer(settings: Settings) -> bool:
    """Whether training fixed something by the weights before the step."""
    by_trainer = settings.options.routing_replay == "old_policy"
    return by_trainer or settings.old_logprobs == "trainer"


def _prepare(batch: StoredBatch, settings: Settings) -> RolloutBatch:
    return prepare(
        batch.groups,
        context=batch.record.context,
        advantage=settings.advantage,
        overlong=settings.overlong,
        drop_too_long=settings.options.on_too_long == "drop",
    )


def _method(settings: Settings) -> tuple[object, ...]:
    """What makes two settings the same method."""
    return settings.objective, settings.advantage, settings.counts_flat


def _budget(policy: Policy) -> int:
    return row_budget(policy.lm.config.get_text_config(), checkpointing=False)


def _check_memory(policy: Policy, methods: int) -> None:
    """One float32 gradient a method is held."""
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
    """Bytes that can still be had; None where the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else None
