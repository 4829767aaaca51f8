"""The live panel of a run: at most four lines, at any width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII = "_.-:=+*#"
_WIDEST = 100


def spark(
    values: Sequence[float], low: float | None = None, high: float | None = None, marks: str = ""
) -> str:
    """One mark a value, between the bounds; by default, those of the values.

    >>> spark([0.0, 0.5, 1.0])
    '▁▅█'
    >>> spark([0.25, 0.5], low=0, high=1)
    '▃▅'
    >>> spark([2, 2])
    '▁▁'
    """
    if not values:
        return ""
    marks = marks or _BLOCKS
    low = min(values) if low is None else low
    high = max(values) if high is None else high
    scale = len(marks) / (high - low) if high > low else 0.0
    return "".join(marks[min(len(marks) - 1, int((v - low) * scale))] for v in values)


def condense(values: Sequence[float], width: int) -> list[float]:
    """Means of `width` neighbouring stretches; the values themselves where they fit.

    >>> condense([1, 3, 5, 7], 2)
    [2.0, 6.0]
    """
    count = len(values)
    if count <= width:
        return [float(v) for v in values]
    edges = [i * count // width for i in range(width + 1)]
    parts = [values[a:b] for a, b in pairwise(edges)]
    return [sum(part) / len(part) for part in parts]


def clock_text(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any.

    >>> clock_text(61), clock_text(3661)
    ('1:01', '1:01:01')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass
class Progress:
    """What is shown of a run.

    Attributes:
        total, first, step: steps in all, at the start of this process, and so far.
        began, latest: when its first step began and when its latest step ended, by `clock`.
        rewards, clipped: of the steps that this process took.
        tokens: a second, in the latest step.
        held_out: (step, reward and interval) of each evaluation.
        clock: seconds.
    """

    total: int
    first: int
    clock: Callable[[], float]
    step: int = 0
    latest: float = 0.0
    began: float = 0.0
    rewards: list[float] = field(default_factory=list)
    clipped: list[float] = field(default_factory=list)
    tokens: float | None = None
    held_out: list[tuple[int, float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.step = self.first
        self.began = self.latest = self.clock()

    def took(self, step: int, metrics: dict[str, float]) -> None:
        """Count a step."""
        self.step, self.latest = step, self.clock()
        self.tokens = metrics.get("throughput/tokens_per_second", self.tokens)
        for name, values in (
            ("train/reward", self.rewards),
            ("ratio/clip_fraction", self.clipped),
        ):
            if name in metrics:
                values.append(metrics[name])

    def measured(self, step: int, reward: float, interval: str) -> None:
        """Count an evaluation."""
        self.held_out.append((step, reward, interval))
        if self.step == self.first:  # the time that a step takes is counted from here
            self.began = self.latest = self.clock()

    def left(self) -> str:
        """Time left, by the mean of the steps so far; '-' before the first."""
        done = self.step - self.first
        if done <= 0:
            return "-"
        each = (self.latest - self.began) / done
        return clock_text(max(0.0, each * (self.total - self.step) - self.clock() + self.latest))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # One column stays free: some terminals wrap a full line.
        width = min(options.max_width - 1, _WIDEST)
        marks = _marks(options.ascii_only)
        ended = self.step >= self.total
        timing = f"took {clock_text(self.latest - self.began)}" if ended else f"{self.left()} left"
        notes = [timing, _range(self.rewards), self._speed()]
        side = max(len(note) for note in notes)
        count = f"{self.step}/{self.total}"
        number = max(8, len(count))
        room = max(4, width - 8 - number - side - 3)
        bar = ProgressBar(self.total, self.step, width=room)
        table = Table.grid(padding=(0, 1))
        table.add_column(style="dim", width=8)
        table.add_column(justify="right", width=number, no_wrap=True)
        table.add_column(width=room, no_wrap=True)
        table.add_column(justify="right", width=side, no_wrap=True, style="dim")
        table.add_row("step", count, bar, notes[0])
        chart = Text(spark(self.rewards[-room:], marks=marks), style="green")
        table.add_row("reward", _value(self.rewards, "{:.3f}"), chart, notes[1])
        chart = Text(spark(self.clipped[-room:], low=0, marks=marks), style="yellow")
        table.add_row("clipped", _value(self.clipped, "{:.1%}"), chart, notes[2])
        yield table
        if self.held_out:
            yield self._measured(width)

    def _measured(self, width: int) -> Text:
        """The latest held-out reward, and the first one where there is room for it."""
        step, reward, interval = self.held_out[-1]
        line = Text.assemble(("held-out ", "dim"), f"{reward:8.3f} ", (interval, "dim"))
        first, before, _ = self.held_out[0]
        ends = [f" at step {step}; {before:.3f} at step {first}"] if first != step else []
        for end in [*ends, f" at step {step}"]:
            if len(line) + len(end) <= width:
                return line.append(end, "dim")
        return line

    def _speed(self) -> str:
        return "" if self.tokens is None else f"{self.tokens:,.0f} tokens/s"

    def summary(self, width: int, ascii_only: bool = False) -> str:
        """What stays in the scrollback: one line, with as many of the rewards as fit."""
        ended = self.step >= self.total
        parts = [
            f"step {self.step}/{self.total}" if ended else f"stopped at {self.step}/{self.total}"
        ]
        if self.rewards:
            parts.append(f"reward {self.rewards[-1]:.3f}")
        if self.clipped:
            parts.append(f"clipped {self.clipped[-1]:.1%}")
        if self.tokens is not None:
            parts.append(self._speed())
        room = width - len("  ".join(parts)) - 2
        if self.rewards and room >= 4:
            parts[1] += " " + spark(condense(self.rewards, min(room, 40)), marks=_marks(ascii_only))
        return "  ".join(parts)


def _value(values: Sequence[float], form: str) -> str:
    return form.format(values[-1]) if values else "-"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}" if values else ""


def _marks(ascii_only: bool) -> str:
    return _ASCII if ascii_only else _BLOCKS
