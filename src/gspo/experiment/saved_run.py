"""Runs on disk by name: which there are, their checkpoints, and how to load one of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo.backend.engines import load_step
from gspo.backend.metrics_file import Record, read_metrics
from gspo.backend.run import best_step, in_use
from gspo.core.errors import ConfigError, RunError, suggestion
from gspo.dev import InternalModelConfig
from gspo.experiment.spec import Spec
from gspo.policy.embedded import PREFIX
from gspo.policy.load import load_policy
from gspo.policy.policy import Policy
from gspo.policy.probe import choose_packing
from gspo.train.checkpoint import checkpoint_name, steps_saved


@dataclass(frozen=True)
class SavedRun:
    """A run's folder as it is read: nothing is locked, nothing is written.

    Attributes:
        folder: of the run.
        config: config.json.
        spec: what `gspo train` ran; None for a program of the user's own, or if this gspo doesn't
            understand it.
    """

    folder: Path
    config: Mapping[str, Any]
    spec: Spec | None

    @property
    def name(self) -> str:
        """`<project>/<name>`."""
        return "/".join(self.folder.resolve().parts[-2:])

    @property
    def base_model(self) -> str:
        """What the run was begun with."""
        return str(self.config.get("base_model"))

    @property
    def load(self) -> InternalModelConfig:
        """How the run loads its model."""
        if self.spec is not None:
            return self.spec.load
        return InternalModelConfig.model_validate({"lora": self.config.get("lora")})

    def records(self) -> list[Record]:
        """The lines of metrics.jsonl."""
        return read_metrics(self.folder / "metrics.jsonl")

    def rewards(self) -> dict[int, float]:
        """Held-out reward by step."""
        lines = self.records()
        return {int(r["step"]): r["val/reward"] for r in lines if "val/reward" in r}

    def step(self, wanted: str) -> int:
        """The saved step that `best`, `latest` or a number means; 0 is the base model.

        Raises:
            RunError: no such checkpoint; it names those that are there.
            ConfigError: none of the three.
        """
        saved, rewards = steps_saved(self.folder / "checkpoints"), self.rewards()
        best = best_step({step: rewards.get(step, math.nan) for step in saved})
        there = ", ".join(f"{step} (best)" if step == best else str(step) for step in saved)
        told = f"it has steps {there}" if saved else "it has none at all"
        if wanted == "latest" and saved:
            return saved[-1]
        if wanted == "best" and best is not None:
            return best
        if wanted == "best" and saved:
            raise RunError(
                f"the run {self.name} has no held-out reward at any saved step, so none is the "
                f"best: say which one; {told}"
            )
        if wanted not in ("best", "latest"):
            if not wanted.isdecimal():
                raise ConfigError(f"--step {wanted!r}: give best, latest, or a number; {told}")
            if int(wanted) in (0, *saved):
                return int(wanted)
        which = "" if wanted in ("best", "latest") else f" of step {wanted}"
        raise RunError(f"the run {self.name} has no checkpoint{which}: {told}")

    @contextmanager
    def reading(self, step: int) -> Iterator[Path]:
        """The folder of a saved step, to be read in the block.

        Raises:
            RunError: the run went on meanwhile, and deleted it.
        """
        folder = self.folder / "checkpoints" / checkpoint_name(step)
        try:
            yield folder
        except Exception:
            if folder.exists():
                raise
            raise RunError(
                f"the checkpoint of step {step} was deleted while it was read: the run {self.name} "
                "goes on and keeps its latest ones. Ask again, or give --step best"
            ) from None

    def policy(self, step: int) -> Policy:
        """The weights of a step.

        Raises:
            ModelError, CheckpointError: see `load_step`.
        """
        if step == 0:
            return load_step(self.base_model, self.load, None)
        with self.reading(step) as checkpoint:
            return load_step(self.base_model, self.load, checkpoint)

    def running(self) -> bool:
        """Whether a process holds the run."""
        return in_use(self.folder)


def read_run(folder: Path) -> SavedRun | None:
    """The run of a folder; None if it is none."""
    config = _object(folder / "config.json")
    if "format" not in config or "base_model" not in config:  # the config of a model has neither
        return None
    try:
        stored = _object(folder / "spec.json")
        spec = Spec(**stored) if stored else None
    except ConfigError:
        spec = None
    return SavedRun(folder, config, spec)


def find_runs(path: str | Path) -> list[SavedRun]:
    """All runs of a folder of runs, of a project, or the one that the folder itself is."""
    found = [file.parent for depth in ("", "*/", "*/*/") for file in _glob(path, depth)]
    return [run for folder in sorted(found) if (run := read_run(folder))]


def find_run(name: str, path: str | Path) -> SavedRun:
    """The run that is meant by its folder, `<project>/<name>`, or `<name>`.

    Args:
        name: what the user wrote.
        path: folder of the runs.

    Raises:
        RunError: there is none, or there are several; it names them, or those of a like name.
    """
    if run := read_run(Path(name).expanduser()):
        return run
    runs = {run.name: run for run in find_runs(Path(path).expanduser())}
    if name in runs:
        return runs[name]
    same = [full for full in runs if full.rpartition("/")[2] == name]
    if len(same) == 1:
        return runs[same[0]]
    if same:
        raise RunError(f"several runs in {path} are called {name!r}: {', '.join(same)}")
    last = {full.rpartition("/")[2]: full for full in runs}
    near = suggestion(name, runs) or suggestion(last.get(name, name), last)
    there = f"Runs there: {', '.join(runs)}." if runs else "There are none at all."
    raise RunError(
        f"no run {name!r} in {path}.{near} {there} Give its folder, or --path of the runs"
    )


def load_named(name: str, step: str | None, path: str) -> tuple[Policy, SavedRun | None]:
    """Load a checkpoint of a run, or any model: an embedded one, a folder, an adapter, a hub id.

    Args:
        name: of the run (see `find_run`), or of the model.
        step: of the run, see `SavedRun.step`; None: the latest.
        path: folder of the runs.

    Returns:
        The policy, and the run if it is of one.

    Raises:
        RunError: see `find_run` and `SavedRun.step`.
        ConfigError: a step of what is no run.
        ModelError: the model cannot be loaded.
    """
    folder = Path(name).expanduser()
    is_model = name.startswith(PREFIX) or (folder.is_dir() and read_run(folder) is None)
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    try:
        run = None if is_model else find_run(name, path)
    except RunError as error:
        if not is_hub_id or "Did you mean" in str(error):
            raise RunError(f"{error}; or name a model: embedded:<task>, a folder") from None
        run = None
    if run is not None:
        return run.policy(run.step(step or "latest")), run
    if step is not None:
        raise ConfigError(f"--step {step}: only a run has steps, and {name!r} is a model")
    policy = load_policy(name)
    choose_packing(policy)
    return policy, None


def _glob(path: str | Path, depth: str) -> list[Path]:
    return list(Path(path).glob(f"{depth}config.json"))


def _object(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty if there is none, or something else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
