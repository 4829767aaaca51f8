"""`gspo inspect`: what would each method have done with a rollout batch that a run has stored?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gspo.backend.stored_batch import UpdateRecord
from gspo.core.errors import ConfigError, check_names
from gspo.core.metrics import Metrics
from gspo.core.tables import as_text, cells, table, text
from gspo.data.sample import flat, split_counts, unit_count
from gspo.lab.audit_report import summarise
from gspo.lab.stored_step import WEIGHTS, StoredStep, cosines, gram, method_gradient
from gspo.objective import PRESETS
from gspo.policy.load import Policy
from gspo.serve.admission import free_memory
from gspo.train.expert_replay import ExpertReplay
from gspo.train.minibatches import RolloutBatch, prepare
from gspo.train.settings import Settings

OWN = "this run"
"""Name of the run's method if it is none of the presets."""
_METHOD = (
    *("algorithm", "importance_sampling_level", "epsilon", "epsilon_high", "epsilon_scale"),
    *("scale_rewards", "correction", "correction_low", "correction_high"),
    *("turn_weight", "turn_discount"),
)
"""Options that a preset decides. All others are taken from the run."""
_MEASURED = {
    "loss": "loss/policy",
    "kl": "loss/kl",
    "clip_fraction": "ratio/clip_fraction",
    "clip_fraction_tokens": "ratio/clip_fraction_tokens",
}
"""What is reported of a method, and the metric of training that it is."""


def inspect_run(
    run: Path,
    number: int | None = None,
    weights: str = "both",
    presets: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Loss, gradient, clipping and the gradients' cosines of each method on a stored batch.

    Args:
        run: folder of the run.
        number: of the step, whose batch is taken; None: the last one.
        weights: `before`: those that the step's first update started from; `after`: those it ended
            with; or `both`.
        presets: None: all. The run's method is always included.

    Returns:
        A JSON object: what the batch is, `own` (the name of the run's method), `trained`
        (trajectories with an advantage under it), `turns` (see `_turns`), `left_out` (terms of the
        run's loss that are the same for every method), and `at`: what `_at_weights` returns, before
        and after the step.

    Raises:
        RunError: no such run or step, or the weights are no longer on disk.
        ConfigError: an unknown name, or too many presets for the memory.
    """
    check_names("gspo inspect", presets or (), PRESETS, {}, "preset")
    check_names("gspo inspect", [weights], (*WEIGHTS, "both"), {}, "value of --weights")
    step = StoredStep(run, number)
    training = step.settings()
    chosen = [name for name in WEIGHTS if weights in (name, "both")]
    # Whether training fixed something by the weights before the step.
    by_trainer = training.routing_replay == "old_policy" or training.old_logprobs == "trainer"
    step.check_weights(chosen, needs_before=by_trainer)
    methods = make_methods(step.record, training, presets)
    balance = training.router_aux_loss_coef
    batches = _batches(step, methods.values(), training if by_trainer else None)
    return {
        "run": str(run),
        "step": step.number,
        "own": next(iter(methods)),
        "options": step.record.options,
        **_counts(step, batches[_advantage(training)]),
        "left_out": [f"router_aux_loss_coef={balance:g}"] if balance else [],
        "at": [_at_weights(step, name, methods, batches) for name in chosen],
    }


def _batches(
    step: StoredStep, methods: Iterable[Settings], by_trainer: Settings | None
) -> dict[tuple[object, ...], RolloutBatch]:
    """The step's rollout batch under each kind of advantage that the methods compute.

    Args:
        by_trainer: the run's settings, if training fixed something by the weights before the step.
    """
    context, version = step.record.context, step.record.policy_version
    batches = {
        _advantage(settings): prepare(step.groups, settings, context=context, version=version)
        for settings in methods
    }
    if by_trainer is None:
        return batches
    experts = ExpertReplay(step.load("before").policy, by_trainer, Metrics())
    return {
        kind: replace(batch, samples=tuple(experts.fixed([batch.samples])))
        for kind, batch in batches.items()
    }


def _counts(step: StoredStep, batch: RolloutBatch) -> dict[str, Any]:
    """How many trajectories, groups and tokens the batch has, and what became of them."""
    return {
        "trajectories": len(batch.samples),
        "dropped": batch.dropped + batch.stale,
        "groups": len(set(batch.groups)),
        "flat_groups": batch.flat_groups,
        "splits": split_counts(flat(batch.samples)),
        "trained": sum(samples[0].has_signal for samples in batch.samples),
        "turns": _turns(step, batch),
        "tokens": sum(sample.sampled for samples in batch.samples for sample in samples),
    }


def _at_weights(
    step: StoredStep,
    weights: str,
    methods: Mapping[str, Settings],
    batches: Mapping[tuple[object, ...], RolloutBatch],
) -> dict[str, Any]:
    """All methods at one set of weights, each on the whole batch as one optimizer step.

    Returns:
        `weights`, their `source`, the `log_ratio` of the sequences that the run's method trains on,
        the `methods` (the run's first), and the `cosines` of each pair of gradients. In a method,
        `epsilon` is None if it has no range, `sequences` is N, `loss` is without the KL term and
        `grad_norm` with it, before any clipping by norm; `cosine` is with the run's gradient.
    """
    trainer = step.load(weights)
    _check_memory(trainer.policy, len(methods))
    gradients, log_ratios = [], []
    rows: list[dict[str, Any]] = []
    for name, settings in methods.items():
        batch, objective = batches[_advantage(settings)], settings.objective
        batch = batch if settings.preset.counts_flat else batch.with_signal()
        observer, gradient = method_gradient(trainer, batch, settings)
        gradients.append(gradient)
        log_ratios.append([trace.log_ratio for trace in observer.traces if trace.advantage])
        metrics, unit = observer.metrics.compute(), settings.sequence_unit
        clip_range = [objective.epsilon_low, objective.epsilon_high]
        row = {
            "name": name,
            "epsilon": clip_range if objective.has_range else None,
            "sequences": sum(unit_count(samples, unit) for samples in batch.samples),
        }
        rows.append(row | {field: metrics.get(key, 0.0) for field, key in _MEASURED.items()})
    products = gram(gradients)
    matrix, norms = cosines(products), products.diag().sqrt().tolist()
    for row, norm, cosine in zip(rows, norms, matrix[0], strict=True):
        row |= {"grad_norm": norm, "cosine": cosine}
    return {
        "weights": weights,
        "source": step.weights_of(weights),
        "log_ratio": summarise(np.array(log_ratios[0])) if log_ratios[0] else None,
        "methods": rows,
        "cosines": matrix,
    }


def make_methods(
    record: UpdateRecord, training: Settings, presets: Sequence[str] | None = None
) -> dict[str, Settings]:
    """The run's method first, then the presets with their defaults.

    What a method doesn't decide (KL, old log-probs, what a sequence is, ...) is taken from the run.
    """

    def method(settings: Settings) -> tuple[object, ...]:
        return settings.objective, settings.preset.counts_flat, *_advantage(settings)

    dropped = dict.fromkeys(_METHOD)
    by_name = {name: record.settings(**dropped | {"algorithm": name}) for name in PRESETS}
    run_name = next((n for n, s in by_name.items() if method(s) == method(training)), OWN)
    chosen = by_name if presets is None else {n: by_name[n] for n in by_name if n in presets}
    return {run_name: training} | {n: s for n, s in chosen.items() if n != run_name}


def _advantage(settings: Settings) -> tuple[object, ...]:
    """How a method makes advantages: methods that do it alike share a batch."""
    return settings.preset.advantage, settings.turn_weight, settings.turn_discount


def _turns(step: StoredStep, batch: RolloutBatch) -> list[dict[str, Any]]:
    """By number of turn: trajectories that got there, their mean reward for it, and mean, least and
    largest A_ik of the run's method. Empty if no turn has a reward."""
    stored = [trajectory for group in step.groups for trajectory in group]
    found: dict[int, list[tuple[float, float]]] = {}
    for first, *_ in batch.samples:
        rewards = stored[first.trajectory_id].turn_rewards or ()
        own = first.turn_advantages or (first.advantage,) * len(rewards)
        for turn, pair in enumerate(zip(rewards, own, strict=True), 1):
            found.setdefault(turn, []).append(pair)
    rows: list[dict[str, Any]] = []
    for turn, pairs in found.items():
        # A mean that is 0 but for rounding is shown as 0.
        reward, mean = np.mean(pairs, axis=0).round(12).tolist()
        values = [value for _, value in pairs]
        row = {"turn": turn, "trajectories": len(pairs), "reward": reward}
        rows.append(row | {"advantage": {"mean": mean, "low": min(values), "high": max(values)}})
    return rows


def _check_memory(policy: Policy, methods: int) -> None:
    """Refuse more float32 gradients than fit, before the work."""
    free = free_memory(policy.device)
    size = 4 * sum(p.numel() for p in policy.trainable.values())
    if free is not None and methods * size > free:
        raise ConfigError(
            f"{methods} gradients of {size / 2**20:,.0f} MiB each don't fit the "
            f"{free / 2**20:,.0f} MiB that are free: name at most {max(free // size, 1)} methods "
            "with --presets, the run's own included"
        )


FEW = 6
"""Up to this many methods, the cosines of all pairs are printed without being asked for."""
_COLUMNS = ("name", "epsilon", "loss", "grad_norm", "clip_fraction")
_COLUMNS += ("clip_fraction_tokens", "cosine")


def render(inspection: Mapping[str, Any], *, matrix: bool = False) -> str:
    """The object of `inspect_run` as text; `matrix` prints the cosines of however many methods."""
    options = ", ".join(f"{name}={value}" for name, value in inspection["options"].items())
    parts: list[Any] = [
        "{run}, step {step}: ".format(**inspection) + _trajectories(inspection),
        f"its method: {inspection['own']} ({options or 'all options at their defaults'})",
    ]
    if inspection["turns"]:
        parts.append("rewards of turns, and their advantages: mean [least, largest]")
        names = ("turn", "trajectories", "reward", "advantage")
        parts.append(table(cells(names, inspection["turns"])))
    for term in inspection["left_out"]:
        parts.append(f"left out, being the same for every method: {term}")
    for at in inspection["at"]:
        names = [method["name"] for method in at["methods"]]
        when = f"weights {at['weights']} the step"
        heading = f"\n{when} ({at['source']})"
        if at["log_ratio"] is not None:
            told = "; log-ratios of sequences, median [1 %, 99 %]: {p50:.2g} [{p01:.2g}, {p99:.2g}]"
            heading += told.format(**at["log_ratio"])
        parts += [heading, table(cells(_COLUMNS, at["methods"]))]
        if matrix or len(names) <= FEW:
            pairs = zip(names, at["cosines"], strict=True)
            rows = [[name, *(text(value) for value in row)] for name, row in pairs]
            parts += [f"cosines of the gradients, {when}", table([["", *names], *rows])]
    return as_text(parts, width=140)


def _trajectories(inspection: Mapping[str, Any]) -> str:
    about = "{trajectories} trajectories in {groups} groups".format(**inspection)
    if inspection["flat_groups"]:
        about += f" ({inspection['flat_groups']} with equal rewards)"
    if inspection["dropped"]:
        about += f", {inspection['dropped']} too long and dropped"
    for reason, times in inspection["splits"].items():
        about += f", {times} split ({reason})"
    return about + ", {trained} with an advantage, {tokens:,} sampled tokens".format(**inspection)
