"""The loop, on one screen: roll out, train, and measure on held-out prompts."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import gspo as art
from gspo.backend.local import LocalBackend
from gspo.files import strict_json, write_whole
from gspo.lab.profile import Profile
from gspo.lab.rollout import Rollouts
from gspo.lab.spec import Spec
from gspo.timing import span


@dataclass(frozen=True)
class Estimate:
    """Mean reward over prompts and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def parts(self) -> dict[str, float]:
        """The three numbers by the ending of their metric's name."""
        return {"": self.mean, "_low": self.low, "_high": self.high}

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Outcome:
    """What a finished experiment found. `before` and `after` are held-out rewards."""

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
            prompts=spec.eval_prompts,
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
        if record["step"] == step and "val/reward_high" in record:
            return Estimate(
                record["val/reward"], record["val/reward_low"], record["val/reward_high"]
            )
    if await model.get_step() != step:  # an older run, started without an evaluation
        return None
    groups = await art.gather_trajectory_groups(
        (
            rollouts.group("heldout", index, spec.eval_completions, step)
            for index in range(spec.eval_prompts)
        ),
        pbar_desc=None,
    )
    estimate = bootstrap(_by_prompt(rollouts, groups))
    # By distinct prompt, also in the log: a resumed run reads its start from there.
    found = {f"val/reward{end}": value for end, value in estimate.parts().items()}
    await model.log(groups, "val", metrics=found, step=step)
    watch.evaluated(step, estimate)
    return estimate


def _by_prompt(rollouts: Rollouts, groups: Sequence[art.TrajectoryGroup]) -> list[float]:
    """Mean reward of each distinct prompt: one that is drawn twice is no new evidence."""
    rewards: dict[str, list[float]] = {}
    for index, group in enumerate(groups):
        problem = rollouts.scenario("heldout", index).problem
        key = problem.prompt if problem else str(index)
        rewards.setdefault(key, []).extend(t.reward for t in group)
    return [sum(own) / len(own) for own in rewards.values()]


def bootstrap(values: Sequence[float], draws: int = 2000) -> Estimate:
    """Mean and its percentile bootstrap interval, from a fixed seed.

    >>> bootstrap([1.0, 1.0, 1.0])
    Estimate(mean=1.0, low=1.0, high=1.0)
    """
    rng = random.Random(0)
    size = len(values)
    means = sorted(sum(rng.choices(values, k=size)) / size for _ in range(draws))
    return Estimate(sum(values) / size, means[int(0.025 * draws)], means[int(0.975 * draws) - 1])


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
        "reward_before_95": outcome.before and list(asdict(outcome.before).values())[1:],
        "reward_after_95": outcome.after and list(asdict(outcome.after).values())[1:],
        "prompts": outcome.prompts,
        "steps": outcome.steps,
        "seconds": round(outcome.seconds, 2),
        "run": str(outcome.run),
    }
