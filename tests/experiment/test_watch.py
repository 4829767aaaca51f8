"""The live view, as a terminal and as a log file see it."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

import pytest
from rich.console import Console

from gspo.experiment.loop import Estimate
from gspo.experiment.panel import Progress, clock_text, condense, spark
from gspo.experiment.spec import Spec
from gspo.experiment.watch import LiveWatch


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(width: int = 80, **options: Any) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    fields: dict[str, Any] = {"force_terminal": True, "color_system": "truecolor", "_environ": {}}
    return Console(file=file, width=width, **(fields | options)), file


def metrics(step: int, **extra: float) -> dict[str, float]:
    return {
        "train/reward": step / 10,
        "ratio/clip_fraction": 0.125,
        "throughput/tokens_per_second": 1234.5,
    } | extra


def panel(steps: int, total: int = 20, width: int = 80) -> tuple[list[str], Progress, Clock]:
    """The lines of a panel after `steps` steps of two seconds each."""
    clock = Clock()
    progress = Progress(total, 0, clock)
    for step in range(1, steps + 1):
        clock.now += 2
        progress.took(step, metrics(step))
    return lines(progress, width), progress, clock


def lines(progress: Progress, width: int) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, _environ={}).print(progress)
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("steps", [0, 1, 7, 20])
def test_no_line_is_wider_than_the_terminal_and_none_wraps(width: int, steps: int):
    _, progress, _ = panel(steps, width=width)
    assert len(lines(progress, width)) == 3
    progress.measured(0, 0.25, "[0.200, 0.300]")
    progress.measured(steps, 0.5, "[0.400, 0.600]")
    shown = lines(progress, width)
    assert len(shown) == 4
    assert max(len(line) for line in shown) < width
    for label, line in zip(("step", "reward", "clipped", "held-out"), shown, strict=True):
        assert line.startswith(label)


def test_a_panel_in_full():
    _, progress, _ = panel(8, width=60)
    progress.measured(0, 0.25, "[0.200, 0.300]")
    progress.measured(6, 0.5, "[0.400, 0.600]")
    assert [line.rstrip() for line in lines(progress, 80)] == [
        "step         8/20 ━━━━━━━━━━━━━━━━━━                                  0:24 left",
        "reward      0.800 ▁▂▃▄▅▆▇█                                       0.100 to 0.800",
        "clipped     12.5% ████████                                       1,234 tokens/s",
        "held-out    0.500 [0.400, 0.600] at step 6; 0.250 at step 0",
    ]


def test_only_the_last_steps_that_fit_are_drawn():
    shown, _, _ = panel(100, total=200, width=60)
    bars = [c for c in shown[1] if c in "▁▂▃▄▅▆▇█"]
    assert 10 < len(bars) < 40
    assert (bars[0], bars[-1]) == ("▁", "█")
    assert "10.000" in shown[1] and "0.100 to 10.000" in shown[1]


def test_long_counts_are_not_cut():
    progress = Progress(200_000, 100_000, Clock())
    assert "100000/200000" in lines(progress, 60)[0]


def test_time_left_is_counted_from_the_first_step_and_runs_down():
    clock = Clock()
    progress = Progress(10, 2, clock)
    assert progress.left() == "-"
    clock.now += 50
    progress.measured(2, 0.1, "")
    clock.now += 4
    progress.took(4, metrics(4))
    assert progress.left() == "0:12"  # 2 s a step, 6 to go
    clock.now += 5
    assert progress.left() == "0:07"
    clock.now += 60
    assert progress.left() == "0:00"
    progress.took(10, metrics(10))
    assert "took 1:09" in lines(progress, 80)[0]
    assert clock_text(3600 * 30 + 61) == "30:01:01"


def test_spark_and_condense():
    assert spark([]) == ""
    assert spark([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert spark([0, 0.5, 1], low=0, high=1, marks="ab") == "abb"
    assert condense([1, 2], 5) == [1, 2]
    assert condense(range(100), 10) == [4.5 + 10 * i for i in range(10)]
    assert len(condense(range(7), 3)) == 3


def test_a_terminal_that_has_no_blocks_gets_ascii():
    _, progress, _ = panel(8)
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(file=file, width=80, _environ={}).print(progress)
    file.flush()
    assert b"_.-:=+*#" in file.buffer.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "_.-:=+*#" in progress.summary(79, ascii_only=True)


def test_the_terminal_keeps_one_line_at_the_end():
    console, file = terminal()
    with LiveWatch(console, Clock()) as watch:
        watch.started(Spec(task="sort", steps=3), 0, ["steps: 2 -> 3"])
        watch.evaluated(0, Estimate(0.25, 0.2, 0.3))
        for step in (1, 2, 3):
            watch.stepped(step, metrics(step))
    text = file.getvalue()
    assert "\x1b[?25l" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # cursor
    kept = text[text.rindex("\x1b[2K") :]
    assert kept.splitlines()[-1].endswith(
        "step 3/3  reward 0.300 ▁▅█  clipped 12.5%  1,234 tokens/s"
    )
    assert "training embedded:sort in .gspo/gspo/run" in text
    assert "changed since the run began: steps: 2 -> 3" in text
    assert "held-out" in text


def test_a_run_that_was_stopped_says_so():
    console, file = terminal(width=50)
    with pytest.raises(KeyboardInterrupt), LiveWatch(console, Clock()) as watch:
        watch.started(Spec(task="sort", steps=30), 4, [])
        watch.stepped(5, metrics(5))
        raise KeyboardInterrupt
    last = file.getvalue().splitlines()[-1]
    assert last.endswith("stopped at 5/30  reward 0.500  clipped 12.5%  1,234 tokens/s")


def test_no_color_is_obeyed():
    console, file = terminal(_environ={"NO_COLOR": "1"})
    with LiveWatch(console, Clock()) as watch:
        watch.started(Spec(task="sort", steps=3), 0, [])
        watch.stepped(1, metrics(1))
    colours = [f"\x1b[{code}m" for code in (*range(30, 38), *range(90, 98))]
    assert not any(code in file.getvalue() for code in [*colours, "\x1b[38;"])
    assert "\x1b[38;" in coloured() or "\x1b[32m" in coloured()


def coloured() -> str:
    console, file = terminal()
    console.print(panel(3)[1])
    return file.getvalue()


def test_warnings_are_printed_above_the_panel(monkeypatch: pytest.MonkeyPatch):
    stderr = Tty()
    monkeypatch.setattr(sys, "stderr", stderr)
    console, file = terminal()
    log = logging.getLogger("gspo")
    before = list(log.handlers)
    with LiveWatch(console, Clock()) as watch:
        watch.started(Spec(task="sort", steps=3), 0, [])
        file.seek(0)
        file.truncate()
        log.warning("step %d is odd [sic]", 1)
        print("from a client", file=sys.stderr)
        said = file.getvalue()
        assert "warning: " in said and "step 1 is odd [sic]" in said
        assert "from a client" in said
        # Each time, the panel is taken away first, and drawn again below.
        assert said.index("\x1b[2K") < said.index("step 1 is odd") < said.rindex("clipped")
    assert log.handlers == before
    assert stderr.getvalue() == ""


def test_warnings_stay_in_a_file_that_stderr_goes_to(monkeypatch: pytest.MonkeyPatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    console, file = terminal()
    with LiveWatch(console, Clock()) as watch:
        watch.started(Spec(task="sort", steps=3), 0, [])
        print("from a client", file=sys.stderr)
        logging.getLogger("gspo").warning("odd")
    assert "from a client" in stderr.getvalue()
    assert "odd" not in file.getvalue()


@pytest.mark.parametrize("dumb", [False, True])
def test_plain_lines_elsewhere(dumb: bool):
    clock, file = Clock(), io.StringIO()
    environment = {"TERM": "dumb"} if dumb else {}
    console = Console(file=file, width=40, force_terminal=dumb, _environ=environment)
    with LiveWatch(console, clock) as watch:
        watch.started(Spec(task="sort", steps=12), 0, [])
        watch.evaluated(0, Estimate(0.25, 0.2, 0.3))
        for step in range(1, 13):
            clock.now += 1
            flat = {"train/skipped": 1.0, "train/trajectories": 8.0}
            extra = flat if step == 12 else {}
            watch.stepped(step, metrics(step, **extra))
    shown = file.getvalue().splitlines()
    assert "\x1b" not in file.getvalue()
    assert shown[1] == "held-out reward at step 0: 0.250 [0.200, 0.300]"
    assert shown[2] == "step 1/12  reward 0.100  clipped 12.5%  tokens/s 1,234  left 0:11"
    assert [line.split()[1] for line in shown[2:]] == [
        "1/12",
        "3/12",
        "5/12",
        "7/12",
        "9/12",
        "11/12",
        "12/12",
    ]
    assert "skipped: all advantages are 0: each group has equal rewards" in shown[-1]


def test_a_step_whose_trajectories_are_all_too_long_says_so():
    file = io.StringIO()
    with LiveWatch(Console(file=file), Clock()) as watch:
        watch.started(Spec(task="sort", steps=1), 0, [])
        counts = {"train/trajectories": 0.0, "train/trajectories_too_long": 5.0}
        watch.stepped(1, {"train/skipped": 1.0, **counts})
    assert "skipped: all 5 trajectories are longer than the context" in file.getvalue()


def test_one_watch_sees_several_runs():
    console, file = terminal()
    with LiveWatch(console, Clock()) as watch:
        for name in ("a", "b"):
            watch.started(Spec(task="sort", name=name, steps=1), 0, [])
            watch.stepped(1, metrics(1))
    assert file.getvalue().count("step 1/1  reward 0.100") == 2
