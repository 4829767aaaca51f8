"""What is shown of a run, as a terminal and as a log file see it: the bar, lines, completions."""

from __future__ import annotations

import io
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import gspo as art
from gspo.backend.stored_batch import write_batch
from gspo.experiment.heldout import Estimate
from gspo.experiment.spec import Spec
from gspo.experiment.watch import LiveWatch, histogram, read_samples, visible
from support import choice


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


def shown(steps: range, total: int, width: int = 80, **options: Any) -> str:
    """All that a terminal gets of a run whose steps take two seconds each."""
    console, file = terminal(width, **options)
    clock = Clock()
    with LiveWatch(console, clock) as watch:
        watch.started(
            Spec(task="sort", steps=total),
            steps.start - 1,
            ["changed since the run began: steps: 2 -> 3"],
        )
        watch.evaluated(0, Estimate(0.25, 0.2, 0.3))
        for step in steps:
            clock.now += 2
            watch.stepped(step, metrics(step))
    return file.getvalue()


def plain(text: str) -> list[str]:
    """The lines that stay, without colours: of a line that was drawn again, the last drawing."""
    text = re.sub(r"\r?(\x1b\[1A)?\x1b\[2K", "\r", text)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return [line.split("\r")[-1] for line in text.split("\n") if line]


def test_a_bar_in_full():
    text = shown(range(1, 9), total=20)
    assert plain(text)[:3] == [
        "training embedded:sort in .gspo/gspo/run",
        "changed since the run began: steps: 2 -> 3",
        "held-out reward at step 0: 0.250 [0.200, 0.300]",
    ]
    assert re.fullmatch(
        r"step  8/20 ━+╸━* 00:24 reward 0\.800  clipped 12\.5%  tokens/s 1,234 *", plain(text)[-1]
    )
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor


@pytest.mark.parametrize("width", [50, 60, 80, 120])
def test_it_fits_the_terminal_and_cuts_the_numbers_first(width: int):
    last = plain(shown(range(1001, 1003), total=2000, width=width))[-1]
    assert len(last) <= width
    assert last.startswith("step 1002/2000 ")
    assert ("tokens/s 1,234" in last) is (width >= 80)


def test_the_bar_stays_when_the_run_ends_and_tells_how_long_it_took():
    assert re.search(r"20/20 ━+ 00:40 reward", plain(shown(range(1, 21), total=20))[-1])


def test_time_left_is_counted_from_where_this_process_began():
    assert "5/10" in (last := plain(shown(range(3, 6), total=10))[-1])
    assert "00:10" in last  # 2 s a step, 5 to go


def test_steps_of_minutes_have_a_time_left_too():
    console, file = terminal()
    clock = Clock()
    with LiveWatch(console, clock) as watch:
        watch.started(Spec(task="sort", steps=10), 0, [])
        for step in (1, 2, 3):
            clock.now += 300
            watch.stepped(step, metrics(step))
    assert "35:00" in plain(file.getvalue())[-1]


def test_a_run_that_was_stopped_keeps_its_bar():
    console, file = terminal()
    with pytest.raises(KeyboardInterrupt), LiveWatch(console, Clock()) as watch:
        watch.started(Spec(task="sort", steps=30), 4, [])
        watch.stepped(5, metrics(5))
        raise KeyboardInterrupt
    assert " 5/30 " in plain(file.getvalue())[-1]


def test_no_color_is_obeyed():
    colour = re.compile(r"\x1b\[(3[0-8]|9[0-7])[;m]|\x1b\[38;")
    assert not colour.search(shown(range(1, 4), 5, _environ={"NO_COLOR": "1"}))
    assert colour.search(shown(range(1, 4), 5))


def test_warnings_are_printed_above_the_bar(monkeypatch: pytest.MonkeyPatch):
    stderr = Tty()
    monkeypatch.setattr(sys, "stderr", stderr)
    handler = logging._StderrHandler(logging.WARNING)  # pyright: ignore[reportAttributeAccessIssue]
    log = logging.getLogger("gspo")
    log.addHandler(handler)  # as where no program has configured logging
    console, file = terminal()
    with LiveWatch(console, Clock()) as watch:
        watch.started(Spec(task="sort", steps=3), 0, [])
        watch.stepped(1, metrics(1))
        file.seek(0)
        file.truncate()
        log.warning("step %d is odd [sic]", 1)
        print("from a client", file=sys.stderr)
        said = file.getvalue()
        assert "step 1 is odd [sic]" in said and "from a client" in said
        # Each time, the bar is taken away first, and drawn again below.
        assert said.index("\x1b[2K") < said.index("step 1 is odd") < said.rindex("clipped")
    log.removeHandler(handler)
    assert stderr.getvalue() == ""


def test_warnings_stay_in_a_file_that_stderr_goes_to(monkeypatch: pytest.MonkeyPatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    console, file = terminal()
    with LiveWatch(console, Clock()) as watch:
        watch.started(Spec(task="sort", steps=3), 0, [])
        print("from a client", file=sys.stderr)
    assert "from a client" in stderr.getvalue()
    assert "client" not in file.getvalue()


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
    lines = file.getvalue().splitlines()
    assert "\x1b" not in file.getvalue()
    assert lines[1] == "held-out reward at step 0: 0.250 [0.200, 0.300]"
    assert lines[4] == "step 3/12  reward 0.300  clipped 12.5%  tokens/s 1,234  left 00:09"
    assert [line.split()[1] for line in lines[2:]] == [f"{step}/12" for step in range(1, 13)]
    assert "skipped" in lines[-1]  # the backend's warning says why


def batch(path: Path, rewards: list[float], text: str = "x") -> Path:
    message = {"role": "assistant", "content": text}
    groups = [
        art.TrajectoryGroup(
            art.Trajectory(
                messages_and_choices=[
                    {"role": "system", "content": "be brief"},
                    {"role": "user", "content": f"prompt {reward}"},
                    choice([4, 5], message=message),
                ],
                reward=reward,
            )
            for reward in rewards
        )
    ]
    write_batch(path / "1.parquet", groups, {number: number / 2 for number in range(len(rewards))})
    return path / "1.parquet"


def printed(batch: Path, count: int, console: Console, file: io.StringIO) -> str:
    """What is shown of step 1 of a run whose trajectories these are."""
    folder = batch.parent / "gspo" / "run" / "trajectories" / "train"
    folder.mkdir(parents=True)
    batch.rename(folder / "0001.parquet")
    with LiveWatch(console, Clock(), samples=count) as watch:
        watch.started(Spec(task="sort", steps=2, path=str(batch.parent)), 0, [])
        watch.stepped(1, metrics(1))
    return file.getvalue()


def logged(batch: Path, count: int) -> list[str]:
    """The lines of a log below the step's own."""
    file = io.StringIO()
    return printed(batch, count, Console(file=file, _environ={}), file).splitlines()[2:]


def test_samples_are_spread_from_the_lowest_to_the_highest_reward(tmp_path: Path):
    path = batch(tmp_path, [0.5, 0.0, 1.0, 0.25, 0.75])
    rewards, samples = read_samples(path, 3)
    assert [sample[0] for sample in samples] == ["0.000", "0.500", "1.000"]
    assert samples[1][1:3] == ("+0.000", "prompt 0.5")
    assert rewards == [0, 0.25, 0.5, 0.75, 1]
    assert len(read_samples(path, 99)[1]) == 5


def test_a_trajectory_that_was_left_out_has_no_advantage(tmp_path: Path):
    group = art.TrajectoryGroup([art.Trajectory(messages_and_choices=[choice([4])], reward=0.5)])
    write_batch(tmp_path / "1.parquet", [group])
    assert "reward 0.500  advantage none" in logged(tmp_path / "1.parquet", 1)[0]


def test_a_log_gets_a_line_each_without_codes_of_the_completion(tmp_path: Path):
    lines = logged(batch(tmp_path, [0.0, 1.0], "a\nb\x1b[2J"), 2)
    assert lines[0] == (
        'sample of step 1: reward 0.000  advantage +0.000  "prompt 0.0" -> "a\\nb\\\\x1b[2J"'
    )
    assert lines[2] == "rewards of step 1: 0 [█        █] 1, mean 0.500"


def test_a_long_completion_says_where_it_was_cut(tmp_path: Path):
    line = logged(batch(tmp_path, [0.0], "y" * 1000), 1)[0]
    assert line.endswith('yyy" ... (1,000 characters)') and len(line) < 400


def test_a_terminal_gets_a_table_without_codes_of_the_completion(tmp_path: Path):
    path = batch(tmp_path, [0.0, 1.0], "[bold]no markup[/bold] \x1b]0;title\x07")
    said = printed(path, 2, *terminal(width=100, color_system=None))
    assert "[bold]no markup[/bold]" in said and "\x1b]0" not in said and "\x07" not in said
    assert "┃" in said and "advantage" in said and "+0.500" in said
    assert re.search(r"step 1 *\n", said) and "rewards of step 1: " in said


@given(st.lists(st.floats(-1e6, 1e6), max_size=50))
def test_a_histogram_counts_every_value(values: list[float]):
    text = histogram(values)
    if len(set(values)) > 1:
        bars = text[text.index("[") + 1 : text.index("]")]
        assert len(bars) == 10 and "█" in bars and bars[0] != " " and bars[-1] != " "
    else:
        assert text.startswith("all " if values else "none")


@given(st.text(st.characters(max_codepoint=0x2FF), max_size=20))
def test_visible_text_moves_no_cursor(text: str):
    shown = visible(text)
    assert all(c.isprintable() or c in "\n\t" or ord(c) > 0x9F for c in shown)
    if text.isascii() and text.isprintable():
        assert shown == text
