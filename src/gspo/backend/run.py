"""A run on disk: config.json, metrics.jsonl, trajectories/, checkpoints/."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from gspo.backend.metrics_file import MetricsFile
from gspo.backend.trackers import Trackers
from gspo.core.errors import ConfigError, RunError, suggestion
from gspo.core.files import explained, names_a_folder, remove, strict_json, write_whole
from gspo.train.checkpoint import checkpoint_name, steps_saved

FORMAT = 1
WRITE_SECONDS = 4000.0
"""Whoever writes waits so long for another thread that does: a checkpoint may take an hour."""


def versions() -> dict[str, str]:
    """The versions of what computes here, as config.json and comparison.json record them."""
    packages = {name: version(name) for name in ("gspo", "torch", "transformers")}
    return {"python": platform.python_version(), **packages}


class Run:
    """The folder `<path>/<project>/<model name>`, held by one process at a time.

    Args:
        path: the backend's folder.
        project, name: of the model.
        identity: what must not change over the run's life, such as the base model.

    Raises:
        RunError: the folder cannot be written, is used by another process, belongs to a newer
            gspo, or to a run with another identity. Nothing was changed then.
    """

    def __init__(self, path: Path, project: str, name: str, identity: Mapping[str, Any]):
        for label, text in (("project", project), ("name", name)):
            if not names_a_folder(text):
                raise RunError(f"model {label} {text!r} cannot be the name of a folder")
        self.project, self.name = project, name
        self._identity = dict(identity)
        self._writes = threading.RLock()
        self._closed = False
        self.folder = path / project / name
        self.checkpoints = self.folder / "checkpoints"
        self._config = self.folder / "config.json"
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = locked(self.folder / ".lock")
        try:
            self._check_identity()
            # What a killed process had begun to write; pictures and reports may be another's.
            for kind in (".*.json*.tmp", ".shared*", "checkpoints/.*.tmp", "trajectories/*/.*.tmp"):
                for leftover in self.folder.glob(kind):
                    remove(leftover)
            self._lines = MetricsFile(self.folder / "metrics.jsonl")
        except BaseException as error:
            self._lock.close()
            if isinstance(error, OSError):
                raise RunError(f"cannot read the run folder {self.folder}: {error}") from None
            raise
        self.metrics, self.line = self._lines.read, self._lines.line
        self.trackers = Trackers((), self, None, {})
        self.settle: Callable[[], None] = lambda: None
        """Waits for what is still being written beside, which `close` does first."""
        self.unblock: Callable[[], None] = lambda: None
        """Ends the servers that what computes may wait for; called by `close`."""

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write what is inside to its end before another process can have the run.

        Raises:
            RunError: the run is closed. A step that was being computed then is not saved.
        """
        with self._alone():
            if self._closed:
                raise RunError(f"the run {self.folder} is closed: nothing more is written to it")
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._writes.acquire(timeout=WRITE_SECONDS):
            raise RunError(
                f"another thread has been writing to the run {self.folder} for "
                f"{WRITE_SECONDS:.0f} s: does its disk hang?"
            )
        try:
            yield
        finally:
            self._writes.release()

    def claim(self, lineage: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write the identity, once it has proved usable: a misspelt model must not stay.

        Args:
            lineage: the runs that this one goes on from, the first one first, as
                `{"run": "<project>/<name>", "step": <the step that was taken>}`.
        """
        if not self._config.exists():
            stored = {"format": FORMAT, **self._identity, "versions": versions()}
            stored |= {"lineage": list(lineage)} if lineage else {}
            with self.writing():
                write_whole(self._config, strict_json(stored, indent=1) + "\n")

    def _check_identity(self) -> None:
        if not self._config.exists():
            return
        try:
            stored = json.loads(self._config.read_bytes())
            written = stored["format"]
            if type(written) is not int:
                raise TypeError(f"format is {written!r}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunError(
                f"{self._config} is damaged ({error}): delete the run or mend it"
            ) from None
        if written > FORMAT:
            raise RunError(
                f"{self.folder} was written by a newer gspo (format {written}, this one reads "
                f"{FORMAT}): upgrade gspo, or use another path"
            )
        for key, value in self._identity.items():
            if stored.get(key) != value:
                raise RunError(
                    f"{self.folder} is a run with {key} {stored.get(key)!r}, not {value!r}: "
                    "give the model another name, or delete that folder"
                )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step: one line per step, later calls add to its line."""
        with self.writing():
            self._lines.put(step, metrics)
            self.trackers.log(step, metrics)

    def forget_after(self, step: int) -> None:
        """Drop what a killed process logged beyond the step that it saved."""
        with self.writing():
            self._lines.truncate(step)

    def trajectories(self, split: str, step: int) -> Path:
        """Return the path of a split's trajectories at a step."""
        return self.folder / "trajectories" / split / f"{step:04d}.parquet"

    def prune(self, latest: int, metric: str, *, required: bool = False) -> None:
        """Delete all checkpoints but the `latest` ones and the one with the highest metric.

        The first of equals stays; a metric that is not finite is none. With `required`, a metric
        that was never logged is refused, if there is a checkpoint to delete.

        Raises:
            ConfigError: it names what was logged. Nothing was deleted.
        """
        saved = steps_saved(self.checkpoints)
        if required and len(saved) > latest:
            names = {name for line in self.metrics() for name in line} - {"step"}
            if metric not in names:
                raise ConfigError(
                    f"delete_checkpoints: no metric {metric!r} was logged, so nothing is deleted."
                    f"{suggestion(str(metric), names)} Logged: {', '.join(sorted(names))}."
                )
        best = best_step({step: self.line(step).get(metric, math.nan) for step in saved})
        with self.writing(), explained(self.checkpoints):
            for step in saved:
                if step not in (*saved[-latest:], best):
                    remove(self.checkpoints / checkpoint_name(step))

    def close(self) -> None:
        """Wait for what is being written, then let another process have the folder.

        From then on nothing is written to the run, whatever is still being computed for it.

        Raises:
            RunError: another thread's writing does not end.
        """
        self.unblock()
        with self._alone():
            try:
                if not self._closed:
                    self.settle()
            finally:
                self._closed = True
                try:
                    self.trackers.finish()
                finally:
                    self._lock.close()


def best_step(scores: Mapping[int, float]) -> int | None:
    """The step with the highest score, the first of equals; None if none is finite.

    >>> best_step({1: 0.5, 2: 0.7, 3: math.nan, 4: 0.7})
    2
    """
    measured = [step for step, score in sorted(scores.items()) if math.isfinite(score)]
    return max(measured, key=scores.__getitem__, default=None)


def locked(path: Path) -> IO[str]:
    """Lock a file for this process, until it is closed.

    Raises:
        RunError: another process has it; the error names the process.
    """
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "?"
        file.close()
        raise RunError(
            f"the run {path.parent} is in use by process {holder}: "
            "stop that program, or close its backend, first"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def in_use(folder: Path) -> bool:
    """Whether a process holds the run of a folder."""
    try:
        with (folder / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
