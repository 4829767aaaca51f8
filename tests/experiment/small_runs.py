"""Experiments of a few seconds, and what they leave."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import gspo as art
from gspo.backend.stored_batch import UpdateRecord, write_batch
from gspo.core.files import strict_json
from gspo.experiment.heldout import Estimate
from gspo.experiment.saved_run import SavedRun, read_run
from gspo.experiment.spec import Spec
from gspo.train.settings import resolve
from gspo.trajectories import TrajectoryGroup
from support import random_groups, trajectory


def trained_run(
    path: Path, base_model: str = "embedded:sort", name: str = "r", **load: Any
) -> SavedRun:
    """A run of one random step, by a program of its own."""

    async def main() -> None:
        model = art.TrainableModel(
            name=name,
            project="p",
            base_model=base_model,
            _internal_config=art.dev.InternalModelConfig(exact=False, **load),
        )
        async with art.LocalBackend(path) as backend:
            await model.register(backend)
            groups = random_groups(backend.policy(model), groups=1, size=2)
            config = art.TrainConfig(learning_rate=1e-2)
            await model.train(groups, config, _config=art.dev.TrainConfig(minibatches=1))

    asyncio.run(main())
    run = read_run(path / "p" / name)
    assert run is not None
    return run


class Silent:
    """A watch that keeps what it saw."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.first = -1
        self.notes: list[str] = []
        self.estimates: list[Estimate] = []

    def started(self, spec: Spec, step: int, notes: list[str]) -> None:
        self.first, self.notes = step, notes

    def stepped(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.append(step)

    def evaluated(self, step: int, estimate: Estimate) -> None:
        self.estimates.append(estimate)


def small(path: Path, **fields: Any) -> Spec:
    sizes: dict[str, Any] = {"steps": 3, "prompts": 4, "completions": 8, "eval_prompts": 8}
    return Spec(**{"path": str(path), "task": "sort", "learning_rate": 1e-3} | sizes | fields)


def records(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "throughput/"))}
        for line in lines
    ]


def own_rollout(path: Path, code: str, **fields: Any) -> Spec:
    path.mkdir(exist_ok=True)
    (path / "turns.py").write_text(code)
    name = f"{path / 'turns.py'}:rollout"
    return small(path, task=None, rollout=name, model="embedded:sort", **fields)


def stored_run(
    path: Path, name: str = "p/r", saved: tuple[int, ...] = (1, 2, 3), **config: Any
) -> Path:
    """A run's folder without weights: rewards 0.2, 0.5, 0.9, 0.4 at the steps 0 to 3."""
    folder = path / name
    for step in saved:
        (folder / "checkpoints" / f"{step:04d}").mkdir(parents=True)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {"format": 1, "base_model": "embedded:sort", "lora": None} | config
    (folder / "config.json").write_text(json.dumps(stored))
    spec = small(path, name=name.partition("/")[2], project=name.partition("/")[0])
    (folder / "spec.json").write_text(strict_json(spec.model_dump(mode="json")))
    rewards = [{"val/reward": reward, "val/prompts": 8} for reward in (0.2, 0.5, 0.9, 0.4)]
    lines = [json.dumps({"step": step, **line}) for step, line in enumerate(rewards)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    record = UpdateRecord.of(resolve(), version=0, context=64, dtype="float32")
    groups = [TrajectoryGroup([trajectory(0.0), trajectory(1.0), trajectory(1.0)])]
    write_batch(
        folder / "trajectories/train/0003.parquet", groups, {0: -1.4, 1: 0.7, 2: 0.7}, None, record
    )
    return folder
