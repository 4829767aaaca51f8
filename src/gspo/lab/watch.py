"""The live view: one bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from gspo.lab.experiment import Estimate
from gspo.lab.spec import Spec

_FIELDS = (
    ("reward", "train/reward", "{:.3f}"),
    ("clipped", "ratio/clip_fraction", "{:.1%}"),
    ("tokens/s", "throughput/tokens_per_second", "{:,.0f}"),
)


class LiveWatch:
    """Shows step, reward, clip fraction, tokens/s and time left. A context manager."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console()
        self._bar: Progress | None = None
        self._total = 0
        self._first = 0
        self._began = 0.0
        self._shown = 0.0

    def __enter__(self) -> LiveWatch:
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}"),
                console=self.console,
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def started(self, spec: Spec, step: int, changed: list[str]) -> None:
        self._total, self._first, self._began = spec.steps, step, time.perf_counter()
        where = f"{spec.path}/{spec.project}/{spec.name}"
        resumed = f", going on from step {step}" if step else ""
        self.console.print(f"training {spec.model} in {where}{resumed}", highlight=False)
        for change in changed:
            self.console.print(f"changed since the run began: {change}", highlight=False)
        if self._bar is not None:
            self._bar.add_task("", total=spec.steps, completed=step, text="")

    def stepped(self, step: int, metrics: dict[str, float]) -> None:
        text = "  ".join(
            f"{label} {form.format(metrics[key])}" for label, key, form in _FIELDS if key in metrics
        )
        if "train/skipped" in metrics:
            text += "  skipped: all groups have equal rewards"
        text += f"  left {self._left(step)}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, text=text)
            return
        # A log file wants a line now and then, not one a step.
        now = time.perf_counter()
        if step == self._total or now - self._shown >= 2.0:
            self._shown = now
            self.console.print(
                f"step {step}/{self._total}  {text}", highlight=False, soft_wrap=True
            )

    def evaluated(self, step: int, estimate: Estimate) -> None:
        self.console.print(f"held-out reward at step {step}: {estimate}", highlight=False)

    def _left(self, step: int) -> str:
        done = step - self._first
        if done <= 0:
            return "-"
        seconds = (time.perf_counter() - self._began) / done * (self._total - step)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
