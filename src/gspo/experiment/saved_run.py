"""Runs on disk by name: which there are, their checkpoints, and how to load one of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gspo.backend.loading import load_step
from gspo.backend.metrics_file import Record, read_metrics
from gspo.backend.run import best_step, in_use
from gspo.backend.stored_batch import UpdateRecord, read_record
from gspo.core.errors import ConfigError, GspoError, RunError, suggestion
from gspo.core.files import read_object
from gspo.dev import InternalModelConfig
from gspo.experiment.heldout import Estimate
from gspo.experiment.run_file import flat, nested
from gspo.experiment.spec import Spec
from gspo.policy.embedded import PREFIX
from gspo.policy.policy import Policy
from gspo.train.checkpoint import checkpoint_name, steps_saved
from gspo.train.settings import Settings


@dataclass(frozen=True)
class SavedRun:
    """A run's folder as it is read, each file once: nothing is locked, nothing is written.

    Attributes:
        folder: of the run.
        config: config.json.
        options: spec.json with dotted keys; empty for a program of the user's own.
        label: its name, distinct among the runs of a report.
    """

    folder: Path
    config: Mapping[str, Any]
    options: Mapping[str, Any]
    label: str = ""

    @classmethod
    def of(cls, folder: Path, label: str = "") -> SavedRun:
        """What the folder's files say, as far as they are there."""
        config, options = (read_object(folder / name) for name in ("config.json", "spec.json"))
        return cls(folder, config, flat(options), label)

    @property
    def name(self) -> str:
        """`<project>/<name>`."""
        return "/".join(self.folder.resolve().parts[-2:])

    @property
    def base_model(self) -> str:
        """What the run was begun with."""
        return str(self.config.get("base_model"))

    @cached_property
    def spec(self) -> Spec | None:
        """What `gspo train` ran; None without options, or if this gspo doesn't understand them."""
        try:
            return Spec(**nested(self.options)) if self.options else None
        except ConfigError:
            return None

    @property
    def load(self) -> InternalModelConfig:
        """How the run loads its model."""
        if self.spec is not None:
            return self.spec.load
        return InternalModelConfig.model_validate({"lora": self.config.get("lora")})

    @cached_property
    def records(self) -> list[Record]:
        """The lines of metrics.jsonl."""
        return read_metrics(self.folder / "metrics.jsonl")

    def series(self, metric: str) -> dict[int, float | None]:
        """A metric by step, as far as it was logged; None for what is not finite."""
        logged = {int(r["step"]): r[metric] for r in self.records if metric in r}
        return {step: v if math.isfinite(v) else None for step, v in logged.items()}

    def values(self, metric: str) -> dict[int, float]:
        """The finite values of a metric by step."""
        return {step: v for step, v in self.series(metric).items() if v is not None}

    @property
    def steps(self) -> int:
        """Calls of `train` so far."""
        return max((int(record["step"]) for record in self.records), default=0)

    @property
    def evaluations(self) -> dict[int, Estimate]:
        """Held-out reward by step."""
        at = self.values("val/reward")
        return {int(r["step"]): Estimate.logged(r) for r in self.records if r["step"] in at}

    @property
    def batches(self) -> dict[int, Path]:
        """The files of the stored rollout batches by their step, in order."""
        files = (self.folder / "trajectories" / "train").glob("*.parquet")
        return dict(sorted((int(file.stem), file) for file in files if file.stem.isdigit()))

    @cached_property
    def last_update(self) -> UpdateRecord | None:
        """How the last stored rollout batch was trained on; None if none is stored."""
        with suppress(GspoError):
            return read_record([*self.batches.values()][-1]) if self.batches else None

    @cached_property
    def settings(self) -> Settings | None:
        """Those of the last update; None without one, or if its method is of another program."""
        with suppress(GspoError):
            return self.last_update.settings() if self.last_update else None

    @property
    def method(self) -> str | None:
        """The method of the last step that was trained; `sft` where none was by rewards."""
        if self.settings is not None:
            return self.settings.algorithm + ", LoRA" * bool(self.config.get("lora"))
        return "sft" if self.values("sft/loss_last") and not self.last_update else None

    @property
    def given(self) -> dict[str, Any]:
        """The options that are not the default; a task and a model have none."""
        default = flat(Spec(task="sort").model_dump(mode="json", exclude={"task", "model"}))
        return {k: v for k, v in self.options.items() if k not in default or v != default[k]}

    def step(self, wanted: str) -> int:
        """The saved step that `best`, `latest` or a number means; 0 is the base model.

        Raises:
            RunError: no such checkpoint; it names those that are there.
            ConfigError: none of the three.
        """
        saved, rewards = steps_saved(self.folder / "checkpoints"), self.values("val/reward")
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

    @property
    def running(self) -> bool:
        """Whether a process holds the run."""
        return in_use(self.folder)


def listed(steps: Iterable[int]) -> str:
    """Steps as people read them.

    >>> listed([1, 4]), listed([])
    ('1, 4', 'none')
    """
    return ", ".join(map(str, steps)) or "none"


def read_run(folder: Path) -> SavedRun | None:
    """The run of a folder; None if it is none."""
    run = SavedRun.of(folder)
    # The config of a model has neither.
    return run if {"format", "base_model"} <= run.config.keys() else None


def find_runs(path: str | Path) -> list[SavedRun]:
    """All runs of a folder of runs, of a project, or the one that the folder itself is."""
    depths = ("", "*/", "*/*/")
    found = [file.parent for at in depths for file in Path(path).glob(f"{at}config.json")]
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
    return load_step(name, InternalModelConfig(), None), None
