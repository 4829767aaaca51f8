"""A comparison as `gspo compare` stores it, and the folder of a run, both made up."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from gspo import TrajectoryGroup
from gspo.backend.run import Run
from gspo.backend.stored_batch import UpdateRecord, write_batch
from gspo.experiment.spec import Spec
from gspo.train.observe import Trace
from gspo.train.settings import resolve
from support import choice, trajectory

ARMS = {"gspo": 0.30, "gspo-auto": 0.36, "grpo": 0.33}
STRESSES: list[dict[str, Any]] = [{}, {"rollout_dtype": "int4"}]
METRICS = ("val/reward", "ratio/clip_fraction", "loss/entropy", "moe/experts_changed")


def comparison(seeds: int = 3, steps: int = 60) -> dict[str, Any]:
    """Three arms under two stresses; one cell failed, one was refused."""
    rng = random.Random(0)
    cells = [
        _cell(rng, arm, gain - (0.15 if stress and arm == "gspo" else 0), stress, seed, steps)
        for stress in STRESSES
        for arm, gain in ARMS.items()
        for seed in range(seeds)
    ]
    cells[-1] |= {"status": "failed", "error": "NumericsError: a gradient is not finite <b>"}
    cells[-1] |= {"curves": {}, "reward_after": None, "auc": None}
    refused = {"id": "luspo-int4-0", "arm": "luspo", "stress": STRESSES[1], "seed": 0}
    cells.append(refused | {"status": "refused", "error": "ConfigError: epsilon='auto' refuses"})
    return {
        "name": "sort: three methods",
        "quick": True,
        "spec": {"task": "sort", "steps": steps},
        "versions": {"gspo": "0.1.0", "torch": "2.13.0"},
        "machine": "2 cores",
        "cells": cells,
        "summary": [_summary(arm, stress, cells) for stress in STRESSES for arm in ARMS],
        "paired": [
            _paired("gspo-auto", "gspo", STRESSES[0], 0.02, 0.05, "no difference shown"),
            _paired("gspo-auto", "gspo", STRESSES[1], 0.21, 0.06, "gspo-auto is higher"),
            _paired("grpo", "gspo", STRESSES[0], 0.01, 0.04, "no difference shown"),
            _paired("grpo", "gspo", STRESSES[1], 0.15, 0.07, "grpo is higher"),
        ],
    }


def _cell(
    rng: random.Random, arm: str, gain: float, stress: dict[str, Any], seed: int, steps: int
) -> dict[str, Any]:
    own = rng.gauss(0, 0.03)
    at = list(range(0, steps + 1, 5))
    reward = [0.26 + (gain + own) * (1 - math.exp(-s / 25)) + rng.gauss(0, 0.01) for s in at]
    later = at[1:]
    curves = {
        "val/reward": {"step": at, "value": reward},
        "ratio/clip_fraction": {"step": later, "value": [0.2 + rng.random() / 5 for _ in later]},
        "loss/entropy": {"step": later, "value": [0.4 - s / 400 for s in later]},
        "moe/experts_changed": {"step": later, "value": [0.05 + own / 9 for _ in later]},
    }
    name = f"{arm}-{stress.get('rollout_dtype', 'plain')}-{seed}"
    return {
        "id": name,
        "arm": arm,
        "stress": stress,
        "seed": seed,
        "run": f"runs/{name}",
        "status": "done",
        "error": None,
        "reward_before": reward[0],
        "reward_after": reward[-1],
        "auc": sum(reward) / len(reward),
        "collapsed": gain < 0.2 and seed == 0,
        "seconds": 60 + 5 * rng.random(),
        "tokens": 400_000 + rng.randrange(9000),
        "curves": curves,
    }


def _summary(arm: str, stress: dict[str, Any], cells: list[dict[str, Any]]) -> dict[str, Any]:
    own = [c for c in cells if (c["arm"], c["stress"], c["status"]) == (arm, stress, "done")]

    def mean(key: str) -> float:
        return sum(cell[key] for cell in own) / len(own)

    def around(key: str) -> dict[str, float]:
        return {"mean": mean(key), "low": mean(key) - 0.04, "high": mean(key) + 0.04}

    return {
        "arm": arm,
        "stress": stress,
        "seeds": len(own),
        "reward_after": around("reward_after"),
        "auc": around("auc"),
        "collapsed": mean("collapsed"),
        "means": {"ratio/clip_fraction": 0.31, "moe/experts_changed": 0.05, "loss/entropy": 0.3},
        "seconds": mean("seconds"),
        "tokens": mean("tokens"),
    }


def _paired(
    a: str, b: str, stress: dict[str, Any], difference: float, half: float, verdict: str
) -> dict[str, Any]:
    out = {"a": a, "b": b, "stress": stress, "metric": "reward_after", "n": 3, "verdict": verdict}
    interval = {"low": difference - half, "high": difference + half}
    return out | {"difference": difference} | interval


def run_folder(path: Path, name: str = "m", *, steps: int = 4, text: str = "42") -> Path:
    """A run of `steps` steps, two groups a step; every model turn says `text`."""
    run = Run(path, "p", name, {"base_model": "embedded:sort", "lora": None})
    run.claim()
    spec = Spec(name=name, project="p", path=str(path), task="sort", steps=steps, seed=7)
    (run.folder / "spec.json").write_text(json.dumps(spec.model_dump(mode="json")))
    record = UpdateRecord.of(resolve(), version=0, context=64, dtype="float32")
    for step in range(1, steps + 1):
        run.log(step, _metrics(step))
        groups = [TrajectoryGroup([_answer(text, g + i) for i in range(3)]) for g in range(2)]
        traces = {number: [_trace(number, step)] for number in (0, 1, 2)}
        advantages = dict(enumerate([1.0, -0.5, -0.5, 0.0, 0.0, 0.0]))
        write_batch(run.trajectories("train", step), groups, advantages, traces, record)
    run.log(0, {"val/reward": 0.25, "val/reward_low": 0.2, "val/reward_high": 0.3})
    run.log(steps, {"val/reward": 0.75, "val/reward_low": 0.7, "val/reward_high": 0.8})
    run.close()
    return run.folder


def _answer(text: str, reward: int) -> Any:
    message = {"role": "assistant", "content": text}
    answer = choice([7, 8, 9], logprobs=[-0.5, -1.0, -0.25], message=message)
    return trajectory(float(reward), answer)


def _trace(number: int, step: int) -> Trace:
    return Trace(
        log_ratio=0.004 * step,
        advantage=1.0 if number == 0 else -0.5,
        length=3.0,
        trajectory_id=number,
        update=number,
        trained_tokens=3,
        clipped_tokens=3 if number == 0 else 0,
        token_log_ratios=np.array([0.03, -0.02, 0.0], dtype=np.float32),
    )


def _metrics(step: int) -> dict[str, float]:
    return {
        "train/reward": step / 10,
        "loss/entropy": 0.4,
        "loss/kl": 0.0,
        "ratio/clip_fraction": 0.5,
        "ratio/clip_fraction_tokens": 0.5,
        "ratio/log_p01": -0.05,
        "ratio/log_p50": 0.0,
        "ratio/log_p99": 0.05,
        "ratio/epsilon_low": 3e-4,
        "ratio/epsilon_high": 4e-4,
        "mismatch/clip_fraction": 0.0,
        "mismatch/log_ratio_abs_max": 1e-6,
        "mismatch/sequence_log_ratio_abs_max": 1e-7,
        "optim/grad_norm": 1.0,
        "optim/learning_rate": 1e-4,
        "moe/load_cv": 0.7,
        "tokens/completion": 18.0,
        "tokens/prompt": 18.0,
        "time/rollout": 0.25,
        "time/train": 0.5,
        "time/publish": 0.0,
        "time/checkpoint": 0.125,
        "time/step": 1.0,
    }


def traces_of(figure: Any) -> list[Any]:
    """The curves of a figure, which plotly types as much else."""
    return list(figure.data)
