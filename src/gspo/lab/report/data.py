"""A run's folder as the report reads it: nothing is locked, nothing is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo.backend.metrics_file import read_metrics
from gspo.backend.run import in_use
from gspo.config import TrainConfig
from gspo.core.errors import ConfigError, RunError
from gspo.dev import TrainConfig as DevTrainConfig
from gspo.experiment.spec import Spec
from gspo.train.settings import Settings, resolve


@dataclass(frozen=True)
class RunData:
    """What is known of a run.

    Attributes:
        folder: of the run.
        label: its name, distinct among the runs of a report.
        config: config.json.
        spec: spec.json, which `gspo demo` and `gspo train` write; else None.
        settings: the resolved method; None without a spec, or with one that this gspo refuses.
        records: lines of metrics.jsonl.
        running: a process holds the run.
    """

    folder: Path
    label: str
    config: Mapping[str, Any]
    spec: Mapping[str, Any] | None
    settings: Settings | None
    records: Sequence[Mapping[str, float]]
    running: bool

    def series(self, key: str) -> tuple[list[int], list[float | None]]:
        """Steps and values of a metric, where it was logged; None where it is not finite."""
        found = [(int(r["step"]), r[key]) for r in self.records if key in r]
        return [s for s, _ in found], [v if math.isfinite(v) else None for _, v in found]

    def values(self, key: str) -> list[float]:
        """The finite values of a metric."""
        return [v for v in self.series(key)[1] if v is not None]

    @property
    def steps(self) -> int:
        """Calls of `train` so far."""
        return max((int(record["step"]) for record in self.records), default=0)

    @property
    def by_sequence(self) -> bool:
        """Whether the clip range is one of sequences, so that l_i is compared with it."""
        if self.settings is not None:
            return self.settings.objective.per_sequence
        return bool(self.values("mismatch/clip_fraction"))  # logged for those alone

    def heldout(self) -> list[tuple[int, float, float, float]]:
        """Step, mean, low and high of each evaluation; without an interval the mean thrice."""
        out = []
        for record in self.records:
            if "val/reward" in record:
                mean = record["val/reward"]
                bounds = (record.get("val/reward_low", mean), record.get("val/reward_high", mean))
                out.append((int(record["step"]), mean, *bounds))
        return out


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """Read runs.

    Raises:
        RunError: a folder that is not one of a run.
    """
    return [_read(folder, label) for folder, label in zip(folders, labels(folders), strict=True)]


def _read(folder: Path, label: str) -> RunData:
    metrics, config = folder / "metrics.jsonl", folder / "config.json"
    if not metrics.exists() and not config.exists():
        raise RunError(
            f"{folder} has neither metrics.jsonl nor config.json: it is not the folder of a run. "
            "A run is <path>/<project>/<model name>"
        )
    running = in_use(folder)  # asked first: a run that ends meanwhile is read again
    spec = _json(folder / "spec.json")
    return RunData(
        folder=folder,
        label=label,
        config=_json(config) or {},
        spec=spec,
        settings=None if spec is None else resolved(spec),
        records=read_metrics(metrics),
        running=running,
    )


def labels(folders: Sequence[Path]) -> list[str]:
    """The last parts of the folders' paths: two, or as many as tell them apart.

    >>> labels([Path("/a/demo/sort-1"), Path("/b/demo/sort-1")])
    ['a/demo/sort-1', 'b/demo/sort-1']
    """
    parts = [folder.resolve().parts for folder in folders]
    for count in range(2, max((len(own) for own in parts), default=0) + 1):
        found = ["/".join(own[-count:]) for own in parts]
        if len(set(found)) == len(found):
            return found
    return [str(folder) for folder in folders]


def changed(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What a stored spec sets to another value than its default, with dotted keys.

    >>> changed({"steps": 60, "seed": 3, "train": {"epochs": 2}})
    {'seed': 3, 'train.epochs': 2}
    """
    known = flat(Spec(task="sort").model_dump(mode="json"))
    return {k: v for k, v in flat(spec).items() if k not in known or v != known[k]}


def resolved(spec: Mapping[str, Any]) -> Settings | None:
    """The method of a stored spec; None where this gspo doesn't understand it."""
    # Options that were written out as their defaults are not options that were given.
    default = DevTrainConfig().model_dump(mode="json")
    stored = spec.get("train", {})
    given = {k: v for k, v in stored.items() if k not in default or v != default[k]}
    try:
        rate = TrainConfig(learning_rate=spec["learning_rate"])
        return resolve(rate, DevTrainConfig(**given))
    except (ConfigError, KeyError, TypeError):
        return None


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of options with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none, or while it is being written."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
