"""The loop, on one screen: roll out, train, and measure on held-out prompts."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gspo as art
from gspo.backend.local import LocalBackend
from gspo.core.files import strict_json, write_whole
from gspo.core.timing import span
from gspo.experiment.rollout import Rollouts
from gspo.experiment.spec import Spec
from gspo.lab.profiling import Profile
from gspo.lab.statistics import Interval, reward_interval


@dataclass(frozen=True)
class Estimate(Interval):
    """Held-out reward: its mean over rollouts, and the 95 % interval of that over prompts.

    Attributes:
        prompts: distinct ones; None in the log of an older run.
    """

    prompts: int | None = None

    def metrics(self) -> dict[str, float]:
        """The estimate as a run logs it."""
        values = {
            "val/reward": self.mean,
            "val/reward_low": self.low,
            "val/reward_high": self.high,
            "val/prompts": self.prompts,
        }
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def logged(cls, record: Mapping[str, float]) -> Estimate:
        """The estimate of a line of metrics.jsonl."""
        low, high = record.get("val/reward_low"), record.get("val/reward_high")
        prompts = record.get("val/prompts")
        return cls(record["val/reward"], low, high, None if prompts is None else int(prompts))


@dataclass(frozen=True)
class Outcome:
    """What a finished experiment found. `before` and `after` are held-out rewards; `prompts` counts
    the distinct ones that they were measured on."""

    run: Path
    steps: int
    prompts: int
    seconds: float
    before: Estimate | None
    after: Estimate | None


class Watch(Protocol):
    """Sees the experiment while it runs."""

    def started(self, spec: Spec, step: int, changed: list[str]) -> None: ...
    def stepped(self, step: int, metrics: dict[str, float]) -> None: ...
    def evaluated(self, step: int, estimate: Estimate) -> None: ...


async def run_experiment(spec: Spec, watch: Watch, profile: Profile | None = None) -> Outcome:
    """Run `spec`, or go on where a killed run of the same folder stopped.

    `profile` sees where the time of the steps goes; the caller holds its clock.
    """
    started = time.perf_counter()
    backend = LocalBackend(
        spec.path, keep_checkpoints=spec.keep_checkpoints, seed=spec.seed, logger=spec.logger
    )
    model = art.TrainableModel(
        name=spec.name,
        project=spec.project,
        base_model=spec.model,
        config=spec,
        _internal_config=spec.load,
    )
    rollouts = Rollouts(spec, model)
    try:
        await model.register(backend)
        folder = backend.run(model).folder
        if profile is not None:
            await backend.with_policies(model, profile.attach)
        watch.started(spec, await model.get_step(), _remember(spec, folder))
        before = await _evaluate(spec, model, rollouts, watch, step=0)

        for step in range(await model.get_step(), spec.steps):
            if spec.eval_every and step % spec.eval_every == 0:
                # Before the step, not behind the last one: a run that was killed between the two
                # makes up for it.
                await _evaluate(spec, model, rollouts, watch, step)
            with span("step"):
                began = time.perf_counter()
                with span("rollout"):
                    groups = await rollouts.batch(step)
                rolled = time.perf_counter() - began
                result = await model.train(groups, spec.train_config(), spec.train)
                timing = _timing(result.metrics, rolled, time.perf_counter() - began)
            await model.log([], "train", metrics=timing, step=result.step)
            watch.stepped(result.step, result.metrics | timing)

        after = await _evaluate(spec, model, rollouts, watch, step=await model.get_step())
        return Outcome(
            run=folder,
            steps=await model.get_step(),
            prompts=(after and after.prompts) or spec.eval_prompts,
            seconds=time.perf_counter() - started,
            before=before,
            after=after,
        )
    finally:
        await backend.close()


def _remember(spec: Spec, folder: Path) -> list[str]:
    """Write the resolved spec to the run; returns what differs from the one it went by before."""
    path = folder / "spec.json"
    text = strict_json(spec.model_dump(mode="json"), indent=1) + "\n"
    new: dict[str, Any] = json.loads(text)
    try:
        old = json.loads(path.read_bytes()) if path.exists() else new
    except (OSError, ValueError, RecursionError):
        old = None
    write_whole(path, text)
    if not isinstance(old, dict):  # nothing depends on it: the run goes on by today's
        return [f"{path} was damaged, and is written again"]
    return [f"{key}: {old.get(key)} -> {new[key]}" for key in new if old.get(key) != new[key]]


async def _evaluate(
    spec: Spec, model: Any, rollouts: Rollouts, watch: Watch, step: int
) -> Estimate | None:
    """Held-out reward at a step, from the run's log where it was measured before."""
    if spec.eval_prompts == 0:
        return None
    for record in model.backend().run(model).metrics():
        if record["step"] == step and "val/reward" in record:
            return Estimate.logged(record)
    if await model.get_step() != step:  # an older run, started without an evaluation
        return None
    groups = await art.gather_trajectory_groups(
        (
            rollouts.group("heldout", index, spec.eval_completions, step)
            for index in range(spec.eval_prompts)
        ),
        pbar_desc=None,
    )
    estimate = estimate_reward(groups)
    # A resumed run reads its start from the log.
    await model.backend().record(model, groups, "val", estimate.metrics(), step)
    watch.evaluated(step, estimate)
    return estimate


def estimate_reward(groups: Sequence[art.TrajectoryGroup]) -> Estimate:
    """Held-out reward from rollouts, with an interval that counts distinct prompts.

    If all rollouts have the same prompt, its reward is what is estimated, and its groups are what
    is counted.
    """
    by_prompt = _by_prompt(groups)
    units = by_prompt if len(by_prompt) > 1 else [[t.reward for t in group] for group in groups]
    found = reward_interval(units)
    return Estimate(found.mean, found.low, found.high, len(by_prompt))


def _by_prompt(groups: Sequence[art.TrajectoryGroup]) -> list[list[float]]:
    """The rewards of each distinct prompt: one that is drawn twice is no new evidence.

    The prompt is what a group's first rollout began with, whoever made it.
    """
    rewards: dict[str, list[float]] = {}
    for group in groups:
        rewards.setdefault(_prompt(group.trajectories[0]), []).extend(t.reward for t in group)
    return list(rewards.values())


def _prompt(trajectory: art.Trajectory) -> str:
    """What stands before the model's first turn."""
    items = trajectory.messages_and_choices
    before = list(itertools.takewhile(lambda item: isinstance(item, dict), items))
    return json.dumps([before, trajectory.tools], sort_keys=True, default=str)


def _timing(metrics: dict[str, float], rolled: float, whole: float) -> dict[str, float]:
    sampled = metrics.get("tokens/completion", 0.0)
    return {
        "time/rollout": rolled,
        "time/step": whole,
        "throughput/sampled_tokens_per_second": sampled / rolled,
        "throughput/tokens_per_second": sampled / whole,
    }


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The fields that `gspo demo --json` and `gspo train --json` print."""
    return {
        "reward_before": outcome.before and outcome.before.mean,
        "reward_after": outcome.after and outcome.after.mean,
        "reward_before_95": outcome.before and [outcome.before.low, outcome.before.high],
        "reward_after_95": outcome.after and [outcome.after.low, outcome.after.high],
        "prompts": outcome.prompts,
        "steps": outcome.steps,
        "seconds": round(outcome.seconds, 2),
        "run": str(outcome.run),
    }
