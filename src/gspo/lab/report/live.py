"""Reports that are written anew while a run is alive."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from gspo.lab.report.data import RunData, read_runs
from gspo.lab.report.page import Live, write_page
from gspo.lab.report.run_page import run_page

if TYPE_CHECKING:
    from gspo.experiment.heldout import Estimate
    from gspo.experiment.loop import Watch
    from gspo.experiment.spec import Spec

log = logging.getLogger("gspo")

EVERY = 10.0
"""Seconds between two pages, at least."""
_SHARE = 0.02
"""Of a run's time, at most, goes into its report."""


def liveliness(runs: Sequence[RunData], every: float = EVERY) -> Live:
    """How often a page of these runs has news, and after what silence a run is taken for dead."""
    longest = max((max(run.values("time/step"), default=0.0) for run in runs), default=0.0)
    return Live(every=max(every, min(longest, 60.0)), patience=max(600.0, 3 * longest))


def write_report(folders: Sequence[Path], out: Path, *, live: bool = False) -> list[RunData]:
    """Write the page of these runs; `live` where it will be written again. Returns what was read.

    Raises:
        RunError: a folder that is not one of a run, or a page that cannot be written.
        MissingDependencyError: plotly is not installed.
    """
    runs = read_runs(folders)
    write_page(out, run_page(runs, liveliness(runs) if live else None))
    return runs


def watch_report(folders: Sequence[Path], out: Path, every: float = EVERY) -> None:
    """Write the page again and again, until no run of these is alive or an interrupt comes.

    It leaves a page that waits for no news.

    Raises:
        RunError, MissingDependencyError: see `write_report`.
    """
    with contextlib.suppress(KeyboardInterrupt):
        while any(run.running for run in write_report(folders, out, live=True)):
            time.sleep(every)
    write_report(folders, out)


class LiveReport:
    """Keeps `<run>/report.html` up to date beside another watch. A context manager.

    Without plotly it does nothing. A report that cannot be written stops nothing: it is logged,
    and tried once more at the end.
    """

    def __init__(self, watch: Watch, every: float = EVERY):
        self._watch = watch
        self._every = every
        self._folder: Path | None = None
        self._due = 0.0
        self._failed = False
        self.path: Path | None = None
        """The page, once it is written."""

    def __enter__(self) -> LiveReport:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._failed = False
        self._write(live=False)

    def started(self, spec: Spec, step: int, changed: list[str]) -> None:
        self._watch.started(spec, step, changed)
        if find_spec("plotly") is not None:
            self._folder = Path(spec.path) / spec.project / spec.name
        self._write(live=True)

    def stepped(self, step: int, metrics: dict[str, float]) -> None:
        self._watch.stepped(step, metrics)
        self._write_if_due()

    def evaluated(self, step: int, estimate: Estimate) -> None:
        self._watch.evaluated(step, estimate)
        self._write_if_due()

    def _write_if_due(self) -> None:
        if time.perf_counter() >= self._due:
            self._write(live=True)

    def _write(self, *, live: bool) -> None:
        if self._folder is None or self._failed:
            return
        began = time.perf_counter()
        path = self._folder / "report.html"
        try:
            write_report([self._folder], path, live=live)
            self.path = path
        except Exception as error:  # whatever it is: the run is worth more than its page
            self._failed = True
            log.warning("the report of %s is not kept up to date: %s", self._folder, error)
        ended = time.perf_counter()
        self._due = ended + max(self._every, (ended - began) / _SHARE)
