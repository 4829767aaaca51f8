"""What is shown of a run while it runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from rich import progress
from rich.console import Console
from rich.table import Column
from rich.text import Text

from gspo.experiment.heldout import Estimate
from gspo.experiment.samples import print_samples
from gspo.experiment.spec import Spec

_FIELDS = (
    ("SFT loss", "sft/loss", "{:.3f}"),
    ("reward", "train/reward", "{:.3f}"),
    ("clipped", "ratio/clip_fraction", "{:.1%}"),
    ("tokens/s", "throughput/tokens_per_second", "{:,.0f}"),
)


class LiveWatch(AbstractContextManager["LiveWatch"]):
    """Shows step, time left, reward, clip fraction and tokens per second. A context manager.

    Args:
        console: a terminal gets a bar, and anything else a line per step.
        clock: the time in seconds.
        samples: how many completions of each step to show.
    """

    def __init__(
        self,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        samples: int = 0,
    ):
        self.console = console or Console()
        self._samples, self._folder = samples, Path()
        self._plain = not self.console.is_terminal or self.console.is_dumb_terminal
        self._bar = progress.Progress(
            progress.TextColumn("step"),
            progress.MofNCompleteColumn(),
            progress.BarColumn(bar_width=12),
            progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            # A narrow terminal cuts the numbers, from the right.
            progress.TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True)),
            console=self.console,
            expand=True,
            # The mean over the whole run: a step may take longer than rich's half minute.
            speed_estimate_period=math.inf,
            # What goes to a file must not end on the terminal.
            redirect_stderr=sys.stderr.isatty(),
            get_time=clock,
        )

    def __exit__(self, *error: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def started(self, spec: Spec, step: int, notes: list[str]) -> None:
        self._folder = spec.folder
        resumed = f", going on from step {step}" if step else ""
        self._print(f"training {spec.model} in {spec.folder}{resumed}")
        for note in notes:
            self._print(note)
        self._bar.add_task("", total=spec.steps, completed=step)
        if not self._plain:
            self._bar.start()

    def stepped(self, step: int, metrics: dict[str, float]) -> None:
        (task,) = self._bar.tasks
        self._bar.update(
            task.id, completed=step, description=_numbers(metrics), refresh=not self._plain
        )
        if self._plain:
            left = progress.TimeRemainingColumn(compact=True).render(task)
            self._print(f"step {step}/{task.total}  {task.description}  left {left}")
        batch = self._folder / "trajectories" / "train" / f"{step:04d}.parquet"
        if self._samples and batch.exists():  # a step of SFT has none
            print_samples(self.console, batch, step, self._samples)

    def evaluated(self, step: int, estimate: Estimate) -> None:
        self._print(f"held-out reward at step {step}: {estimate}")

    def _print(self, text: str) -> None:
        """Print a line; rich puts it above the bar."""
        self.console.print(Text(text), soft_wrap=True)


def _numbers(metrics: dict[str, float]) -> str:
    """The numbers of a step that are shown."""
    parts = [f"{label} {form.format(metrics[k])}" for label, k, form in _FIELDS if k in metrics]
    if "train/skipped" in metrics:
        parts.append("skipped")  # the backend's warning says why
    return "  ".join(parts)
