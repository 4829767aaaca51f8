"""What is shown of a run while it runs: a bar on a terminal, plain lines elsewhere, completions."""

from __future__ import annotations

import json
import math
import sys
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq
from rich import progress
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from gspo.experiment.heldout import Estimate
from gspo.experiment.spec import Spec

T = TypeVar("T")
_FIELDS = (
    ("SFT loss", "sft/loss", "{:.3f}"),
    ("reward", "train/reward", "{:.3f}"),
    ("clipped", "ratio/clip_fraction", "{:.1%}"),
    ("tokens/s", "throughput/tokens_per_second", "{:,.0f}"),
)
_BARS = " ▁▂▃▄▅▆▇█"
_BINS = 10
_LONGEST = 300
"""Characters of a prompt or completion that a line shows."""


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
        self._print(f"training {spec.model} in {spec.folder}{resumed}", *notes)
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
            self._show(batch, step)

    def evaluated(self, step: int, estimate: Estimate) -> None:
        self._print(f"held-out reward at step {step}: {estimate}")

    def _show(self, batch: Path, step: int) -> None:
        """A table of completions on a terminal, a line each elsewhere; and all rewards."""
        rewards, samples = read_samples(batch, self._samples)
        if self._plain:
            for reward, advantage, *texts in samples:
                told = " -> ".join(map(_line, texts))
                self._print(
                    f"sample of step {step}: reward {reward}  advantage {advantage}  {told}"
                )
        else:
            table = Table(title=f"step {step}", title_justify="left", show_lines=True, expand=True)
            for name in ("reward", "advantage"):
                table.add_column(name, justify="right", no_wrap=True)
            for name in ("prompt", "completion"):
                table.add_column(name, ratio=1, overflow="fold")
            for sample in samples:
                table.add_row(*(Text(visible(text)) for text in sample))
            self.console.print(table)
        self._print(f"rewards of step {step}: {histogram(rewards)}")

    def _print(self, *lines: str) -> None:
        """Print lines; rich puts them above the bar."""
        for line in lines:
            self.console.print(Text(line), soft_wrap=True)


def _numbers(metrics: dict[str, float]) -> str:
    """The numbers of a step that are shown."""
    parts = [f"{label} {form.format(metrics[k])}" for label, k, form in _FIELDS if k in metrics]
    if "train/skipped" in metrics:
        parts.append("skipped")  # the backend's warning says why
    return "  ".join(parts)


def read_samples(batch: Path, count: int) -> tuple[list[float], list[tuple[str, str, str, str]]]:
    """All rewards of a stored rollout batch; and of trajectories that are spread evenly over them
    reward, advantage (none: it was left out of training), prompt and completion.

    Args:
        batch: the step's file of trajectories.
        count: how many trajectories.
    """
    rows = pq.read_table(batch, columns=["reward", "advantage", "messages"]).to_pylist()
    rows.sort(key=lambda row: row["reward"])
    samples = []
    for row in spaced(rows, count):
        advantage = "none" if row["advantage"] is None else f"{row['advantage']:+.3f}"
        texts = _prompt_and_answer(json.loads(row["messages"]))
        samples.append((f"{row['reward']:.3f}", advantage, *texts))
    return [row["reward"] for row in rows], samples


def spaced(values: Sequence[T], count: int) -> list[T]:
    """Up to `count` of the values: the first, the last, and some evenly between.

    >>> spaced(range(10), 3), spaced("ab", 3)
    ([0, 4, 9], ['a', 'b'])
    """
    last, count = len(values) - 1, min(count, len(values))
    return [values[at * last // max(1, count - 1)] for at in range(count)]


def histogram(values: Sequence[float]) -> str:
    """Where numbers lie: the bar of each tenth of their range, its ends, and the mean.

    >>> histogram([0, 0, 0, 1])
    '0 [█        ▃] 1, mean 0.250'
    """
    if not values:
        return "none"
    low, high = min(values), max(values)
    mean = f"mean {sum(values) / len(values):.3f}"
    if low == high:
        return f"all {low:.3g}, {mean}"
    counts = [0] * _BINS
    for value in values:
        counts[min(_BINS - 1, int((value - low) / (high - low) * _BINS))] += 1
    bars = "".join(_BARS[-(-count * (len(_BARS) - 1) // max(counts))] for count in counts)
    return f"{low:.3g} [{bars}] {high:.3g}, {mean}"


def visible(text: str) -> str:
    """The text with its control characters spelt out, but for new lines and tabs.

    A completion may hold the codes that move a terminal's cursor or change its title.

    >>> visible("a\\x1b[2Jb\\n")
    'a\\\\x1b[2Jb\\n'
    """
    return "".join(
        c
        if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs")
        else c.encode("unicode_escape").decode()
        for c in text
    )


def _prompt_and_answer(messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """What stands before the first sampled message, and what was sampled; turns by new lines."""
    first = next((i for i, m in enumerate(messages) if m.get("sampled")), len(messages))
    prompt = message_text(messages[first - 1]) if first else ""
    return prompt, "\n".join(message_text(m) for m in messages if m.get("sampled"))


def message_text(message: Mapping[str, Any]) -> str:
    """A message's text, and what else it holds, such as calls of tools, as JSON.

    >>> message_text({"role": "assistant", "content": "Look:", "tool_calls": [1]})
    'Look:\\n{"tool_calls": [1]}'
    """
    rest = {k: v for k, v in message.items() if k not in ("role", "content", "sampled") and v}
    parts = (part for part in (message.get("content"), rest) if part)
    return "\n".join(p if isinstance(p, str) else json.dumps(p, ensure_ascii=False) for p in parts)


def _line(text: str) -> str:
    """A text as one line of JSON, without control characters, which says where it was cut."""
    text = visible(text)
    cut = f" ... ({len(text):,} characters)" if len(text) > _LONGEST else ""
    return json.dumps(text[:_LONGEST], ensure_ascii=False) + cut
