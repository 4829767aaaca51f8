"""A run's folder as the report reads it: nothing is locked, nothing is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo import dev
from gspo.backend.metrics_file import read_metrics
from gspo.backend.run import in_use
from gspo.config import TrainConfig
from gspo.core.errors import ConfigError, RunError
from gspo.experiment.run_file import flat
from gspo.experiment.spec import Spec
from gspo.objective import PRESETS, Preset
from gspo.train.settings import Settings, resolve

Values = Sequence[float | None]


@dataclass(frozen=True)
class RunData:
    """A run, as far as its files tell.

    Attributes:
        label: its name, distinct among the runs of a report.
        config: config.json.
        spec: spec.json with dotted keys; empty for a run of another program than `gspo demo` and
            `gspo train`.
        settings: the resolved method; None without a spec, or if this gspo refuses it.
        records: lines of metrics.jsonl.
        running: whether a process holds the run.
    """

    folder: Path
    label: str
    config: Mapping[str, Any]
    spec: Mapping[str, Any]
    settings: Settings | None
    records: Sequence[Mapping[str, float]]
    running: bool

    def series(self, key: str) -> tuple[list[int], Values]:
        """Steps and values of a metric, as far as it was logged; None for what is not finite."""
        logged = [(int(record["step"]), record[key]) for record in self.records if key in record]
        return [s for s, _ in logged], [v if math.isfinite(v) else None for _, v in logged]

    def values(self, key: str) -> list[float]:
        """The finite values of a metric."""
        return [value for value in self.series(key)[1] if value is not None]

    @property
    def preset(self) -> Preset | None:
        """The named method, if it is one."""
        return PRESETS.get(self.settings.algorithm) if self.settings else None

    @property
    def steps(self) -> int:
        """Calls of `train` so far."""
        return max((int(record["step"]) for record in self.records), default=0)

    def heldout(self) -> list[tuple[int, float, float, float]]:
        """Step, mean, low and high of each evaluation; without an interval the mean thrice."""
        return [
            (int(r["step"]), mean, r.get("val/reward_low", mean), r.get("val/reward_high", mean))
            for r in self.records
            if math.isfinite(mean := r.get("val/reward", math.nan))
        ]


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """Read runs.

    Raises:
        RunError: a folder that is not one of a run.
    """
    runs = []
    for folder, label in zip(folders, labels(folders), strict=True):
        metrics, config = folder / "metrics.jsonl", folder / "config.json"
        if not metrics.exists() and not config.exists():
            raise RunError(
                f"{folder} has neither metrics.jsonl nor config.json: it is not the folder of a "
                "run. Give <path>/<project>/<name>, such as .gspo/demo/sort-1"
            )
        spec = read_object(folder / "spec.json")
        settings = resolved(spec) if spec else None
        stored = (read_object(config), flat(spec), settings, read_metrics(metrics))
        runs.append(RunData(folder, label, *stored, running=in_use(folder)))
    return runs


def stored_batches(run: Path) -> dict[int, Path]:
    """The files of the stored rollout batches by their step, in order."""
    files = (run / "trajectories" / "train").glob("*.parquet")
    by_step = {int(path.stem): path for path in files if path.stem.isdigit()}
    return dict(sorted(by_step.items()))


def labels(folders: Sequence[Path]) -> list[str]:
    """The last two parts of the folders' paths, or all of them if these are the same.

    >>> labels([Path("/a/demo/sort-1"), Path("/b/demo/sort-2")])
    ['demo/sort-1', 'demo/sort-2']
    """
    names = ["/".join(folder.resolve().parts[-2:]) for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def changed(spec: Mapping[str, Any]) -> set[str]:
    """The dotted keys that a stored spec sets to another value than the default.

    >>> sorted(changed({"steps": 60, "seed": 3, "train.epochs": 2}))
    ['seed', 'train.epochs']
    """
    default = flat(Spec(task="sort").model_dump(mode="json"))
    return {key for key, value in spec.items() if key not in default or value != default[key]}


def resolved(spec: Mapping[str, Any]) -> Settings | None:
    """The method of a stored spec; None if this gspo doesn't understand it."""
    # Options that were written out as their defaults are not options that were given.
    default = dev.TrainConfig().model_dump(mode="json")
    stored = spec.get("train", {})
    given = {k: v for k, v in stored.items() if k not in default or v != default[k]}
    try:
        rate = TrainConfig(learning_rate=spec["learning_rate"])
        return resolve(rate, dev.TrainConfig(**given))
    except (ConfigError, KeyError, TypeError):
        return None


def read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty if there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
