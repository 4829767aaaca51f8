"""Completions as they are printed."""

from __future__ import annotations

import io
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import gspo as art
from gspo.backend.stored_batch import write_batch
from gspo.experiment.samples import histogram, print_samples, read_samples, visible
from support import choice


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


def printed(path: Path, count: int, **options) -> str:
    file = io.StringIO()
    console = Console(file=file, width=100, _environ={}, **options)
    print_samples(console, path, 7, count)
    return file.getvalue()


def test_samples_are_spread_from_the_lowest_to_the_highest_reward(tmp_path: Path):
    rewards, samples = read_samples(batch(tmp_path, [0.5, 0.0, 1.0, 0.25, 0.75]), 3)
    assert [sample.reward for sample in samples] == [0.0, 0.5, 1.0]
    assert samples[1].prompt == "prompt 0.5" and samples[1].advantage == 0.0
    assert sorted(rewards) == [0, 0.25, 0.5, 0.75, 1]
    assert len(read_samples(tmp_path / "1.parquet", 99)[1]) == 5


def test_a_log_gets_a_line_each(tmp_path: Path):
    lines = printed(batch(tmp_path, [0.0, 1.0], "a\nb\x1b[2J"), 2).splitlines()
    assert lines[0] == (
        'sample of step 7: reward 0.000  advantage +0.000  "prompt 0.0" -> "a\\nb\\\\x1b[2J"'
    )
    assert lines[2] == "rewards of step 7: 0 [█        █] 1, mean 0.500"


def test_a_long_completion_says_where_it_was_cut(tmp_path: Path):
    line = printed(batch(tmp_path, [0.0], "y" * 1000), 1).splitlines()[0]
    assert line.endswith('yyy" ... (1,000 characters)') and len(line) < 400


def test_a_terminal_gets_a_table_without_codes_of_the_completion(tmp_path: Path):
    path = batch(tmp_path, [0.0, 1.0], "[bold]no markup[/bold] \x1b]0;title\x07")
    text = printed(path, 2, force_terminal=True, color_system=None)
    assert "[bold]no markup[/bold]" in text and "\x1b]0" not in text and "\x07" not in text
    assert "advantage" in text and "+0.500" in text and "step 7" in text


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
