"""The loop, on one screen: roll out, train, and measure on held-out prompts."""

from __future__ import annotations

import json
import time
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gspo as art
from gspo.core.files import read_object, strict_json, write_whole
from gspo.core.timing import span
from gspo.experiment.heldout import Estimate, estimate_reward
from gspo.experiment.plan import check_dataset, check_prompts, remember_dataset
from gspo.experiment.rollout import Rollouts
from gspo.experiment.run_file import flat
from gspo.experiment.spec import Spec
from gspo.tasks import Task
from gspo.train.settings import resolve
from gspo.utils.sft import read_trajectories


@dataclass(frozen=True)
class Outcome:
    """What a finished experiment found.

    Attributes:
        run: folder of the run.
        steps: calls of `train` over the run's life.
        prompts: number of distinct held-out prompts that were measured.
        seconds: the wall time of this process.
        before, after: held-out reward; None if the spec evaluates nothing.
        warm: between them, after the SFT of [sft]; else None.
    """

    run: Path
    steps: int
    prompts: int
    seconds: float
    before: Estimate | None
    after: Estimate | None
    warm: Estimate | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields that `gspo demo --json` and `gspo train --json` print."""
        warm = {"after_sft": self.warm} if self.warm else {}
        found = {"before": self.before, **warm, "after": self.after}
        return {
            **{f"reward_{when}": it and it.mean for when, it in found.items()},
            **{f"reward_{when}_95": it and [it.low, it.high] for when, it in found.items()},
            "prompts": self.prompts,
            "steps": self.steps,
            "seconds": round(self.seconds, 2),
            "run": str(self.run),
        }


class Watch(Protocol):
    """Sees the experiment while it runs."""

    def started(self, spec: Spec, step: int, notes: list[str]) -> None:
        """The run begins at `step`; `notes` say what is worth knowing of it, a line each."""

    def stepped(self, step: int, metrics: dict[str, float]) -> None:
        """Step `step` is trained and saved."""

    def evaluated(self, step: int, estimate: Estimate) -> None:
        """Held-out reward was measured at the weights of `step`."""


_OF_THE_BACKEND = ("keep_checkpoints", "seed", "logger", "engines", "nproc", "cp_size", "ep_size")
"""Fields of a spec that the backend takes under the same names."""


async def run_experiment(spec: Spec, watch: Watch, task: Task | None = None) -> Outcome:
    """Run `spec`, or go on where a killed run of the same folder stopped.

    Args:
        spec: what to run.
        watch: is told of each step.
        task: in place of the spec's own; None: what the spec names.
    """
    resolve(spec.train_config(), spec.train)  # options that contradict cost no evaluation
    started = time.perf_counter()
    lessons = read_trajectories(spec.sft.data) if spec.sft else []
    model = art.TrainableModel(
        name=spec.name,
        project=spec.project,
        base_model=spec.model,
        config=spec,
        _internal_config=spec.load,
    )
    rollouts = Rollouts(spec, model, task)
    await check_dataset(spec, rollouts.task)
    given = {name: getattr(spec, name) for name in _OF_THE_BACKEND}
    made = art.ClusterBackend(spec.path, config=spec.model_dump(exclude_defaults=True), **given)
    async with made as backend, aclosing(rollouts.batches()) as batches:
        await model.register(backend)
        first = await model.get_step()
        watch.started(spec, first, _begin(backend, rollouts))
        before, warm = await _evaluate(backend, rollouts, watch, 0), None
        if spec.sft:
            if first == 0:
                config = spec.sft.model_dump(exclude={"data"})
                config |= {"lr_schedule": "linear", "seed": spec.seed}
                result = await model.train_sft(lessons, art.TrainSFTConfig(**config))
                watch.stepped(result.step, result.metrics)
            first = max(1, first)
            warm = await _evaluate(backend, rollouts, watch, 1)
        for step in range(first, spec.steps):
            if spec.eval_every and step % spec.eval_every == 0:
                # Before the step and not after it: so a run that was killed between training and
                # evaluation evaluates when it goes on.
                await _evaluate(backend, rollouts, watch, step)
            with span("step"):
                began = time.perf_counter()
                with span("rollout"):
                    groups = await anext(batches)
                rolled = time.perf_counter() - began
                options, saves = (spec.train_config(), spec.train), spec.saves(step + 1)
                result = await backend.train(model, groups, *options, save_checkpoint=saves)
                timing = _timing(spec, result.metrics, rolled, time.perf_counter() - began)
            await model.log([], "train", metrics=timing, step=result.step)
            watch.stepped(result.step, result.metrics | timing)
        steps = await model.get_step()
        after = await _evaluate(backend, rollouts, watch, steps)
    prompts = (after and after.prompts) or spec.eval_prompts
    seconds = time.perf_counter() - started
    return Outcome(spec.folder, steps, prompts, seconds, before, after, warm)


def _begin(backend: art.LocalBackend, rollouts: Rollouts) -> list[str]:
    """Refuse prompts that the model cannot take, write to the run what it is made of, and return
    what is worth knowing of it."""
    spec, policy = rollouts.spec, backend.policy(rollouts.model)
    check_prompts(spec, rollouts.task, policy.tokenizer, policy.context)
    exact = "equal to the bit" if policy.exact else f"not equal to the bit: {policy.not_exact}"
    notes = [f"engine and trainer are {exact}"]
    notes += [*remember_dataset(spec, rollouts.task), *_remember(spec)]
    if spec.pipeline:
        notes.append(
            f"pipeline: rollouts run ahead, max_staleness is {spec.steps_ahead}: which weights "
            "sample a token depends on timing, so the run doesn't repeat exactly"
        )
    return notes


def _remember(spec: Spec) -> list[str]:
    """Write the resolved spec to the run, and return what differs from the earlier one."""
    path = spec.folder / "spec.json"
    text = strict_json(spec.model_dump(mode="json"), indent=1) + "\n"
    new = flat(json.loads(text))
    old = flat(read_object(path)) if path.exists() else new
    changed = [key for key in new if old.get(key) != new[key]]
    told = [f"changed since the run began: {k}: {old.get(k)} -> {new[k]}" for k in changed]
    write_whole(path, text)
    # Nothing depends on the old one: the run goes on with the new one.
    return told if old else [f"{path} was damaged, and is written again"]


async def _evaluate(
    backend: art.LocalBackend, rollouts: Rollouts, watch: Watch, step: int
) -> Estimate | None:
    """Measure held-out reward at a step, or read it from the run's log if it is there."""
    spec, model = rollouts.spec, rollouts.model
    if spec.eval_prompts == 0:
        return None
    if "val/reward" in (logged := backend.run(model).line(step)):
        return Estimate.logged(logged)
    if await model.get_step() != step:  # an older run, started without an evaluation
        return None
    sizes = rollouts.task.sizes if rollouts.task else None
    # Rows that are drawn twice are no new evidence.
    prompts = range(min(spec.eval_prompts, sizes["heldout"] if sizes else spec.eval_prompts))
    groups = await rollouts.groups("heldout", prompts, spec.eval_completions, step)
    estimate = estimate_reward(groups)
    # A resumed run reads its start from the log.
    await backend.record(model, groups, "val", estimate.metrics(), step)
    watch.evaluated(step, estimate)
    return estimate


def _timing(spec: Spec, metrics: dict[str, float], rolled: float, whole: float) -> dict[str, float]:
    """Times and speeds of a step, from the seconds that it waited for rollouts, and all of its."""
    sampled = metrics.get("tokens/completion", 0.0)
    speed = {"throughput/tokens_per_second": sampled / whole}
    if not spec.pipeline:  # else these tokens were sampled in other seconds too
        speed["throughput/sampled_tokens_per_second"] = sampled / rolled
    return {"time/rollout": rolled, "time/step": whole, **speed}
