"""The live view: a panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from gspo.experiment.loop import Estimate
from gspo.experiment.panel import Progress
from gspo.experiment.spec import Spec
from gspo.train.checkpoint import steps_saved
from gspo.train.minibatches import why_no_update

_FIELDS = (
    ("reward", "train/reward", "{:.3f}"),
    ("clipped", "ratio/clip_fraction", "{:.1%}"),
    ("tokens/s", "throughput/tokens_per_second", "{:,.0f}"),
)
_QUIET = 2.0
"""Seconds between the lines of a log file."""


class LiveWatch:
    """Shows step, reward, clip fraction, tokens/s and time left. A context manager.

    Args:
        console: where to; a terminal gets a panel, and anything else a line now and then.
        clock: seconds.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self.console = console or Console()
        self._clock = clock
        self._progress: Progress | None = None
        self._live: Live | None = None
        self._shown = 0.0
        self._checkpoints = Path()
        self._handler = _Above(self.console)

    def __enter__(self) -> LiveWatch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def started(self, spec: Spec, step: int, changed: list[str]) -> None:
        self._stop()  # of an earlier run under the same watch
        where = f"{spec.path}/{spec.project}/{spec.name}"
        resumed = f", going on from step {step}" if step else ""
        self._print(f"training {spec.model} in {where}{resumed}")
        for change in changed:
            self._print(f"changed since the run began: {change}")
        self._progress = Progress(spec.steps, step, self._clock)
        self._checkpoints = Path(where) / "checkpoints"
        self._shown = self._clock() - _QUIET
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._start(self._progress)

    def stepped(self, step: int, metrics: dict[str, float]) -> None:
        progress = self._progress
        assert progress is not None
        progress.took(step, metrics)
        if self._live is not None:
            self._live.refresh()
            return
        now = self._clock()
        if step == progress.total or now - self._shown >= _QUIET:
            self._shown = now
            self._print(_line(progress, metrics))

    def evaluated(self, step: int, estimate: Estimate) -> None:
        if self._live is None or self._progress is None:
            self._print(f"held-out reward at step {step}: {estimate}")
            return
        self._progress.measured(step, estimate.mean, estimate.ends)
        self._live.refresh()

    def _start(self, progress: Progress) -> None:
        # What goes to a file must not end on the terminal.
        shared = sys.stderr.isatty()
        self._live = Live(progress, console=self.console, transient=True, redirect_stderr=shared)
        if shared:
            logging.getLogger("gspo").addHandler(self._handler)
        self._live.start(refresh=True)

    def _stop(self) -> None:
        """Take the panel away and leave its summary."""
        live, progress, self._live = self._live, self._progress, None
        if live is None or progress is None:
            return
        live.stop()
        logging.getLogger("gspo").removeHandler(self._handler)
        # A run that is stopped may have saved a step that it did not come to show.
        progress.step = max([progress.step, *steps_saved(self._checkpoints)])
        if progress.step > progress.first:
            self._print(progress.summary(self.console.width - 1, self.console.options.ascii_only))

    def _print(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)


class _Above(logging.Handler):
    """Warnings, printed above the panel: written to the terminal they would tear it."""

    def __init__(self, console: Console):
        super().__init__(logging.WARNING)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        label = record.levelname.lower()
        self.console.print(Text.assemble((f"{label}: ", "yellow"), record.getMessage()))


def _line(progress: Progress, metrics: dict[str, float]) -> str:
    """A step as one line."""
    parts = [f"step {progress.step}/{progress.total}"]
    parts += [f"{label} {form.format(metrics[k])}" for label, k, form in _FIELDS if k in metrics]
    if "train/skipped" in metrics:
        counts = (int(metrics.get(f"train/trajectories{end}", 0)) for end in ("", "_too_long"))
        parts.append(f"skipped: {why_no_update(*counts)}")
    return "  ".join([*parts, f"left {progress.left()}"])
