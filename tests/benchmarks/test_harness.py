"""Pairs, their statistics, and results on disk."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import harness
import pytest
from harness import Pairs, Result, paired, read, stamp, write

from benchmarks.rows import row


def test_doctests() -> None:
    assert doctest.testmod(harness).failed == 0


def test_sides_take_turns_in_going_first() -> None:
    order: list[str] = []
    ticks = iter(range(100))
    pairs = paired(
        lambda: order.append("a"),
        lambda: order.append("b"),
        repeats=3,
        warmup=1,
        clock=lambda: float(next(ticks)),
    )
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert pairs == Pairs((1.0,) * 3, (1.0,) * 3)


def test_the_ratio_is_taken_pair_by_pair() -> None:
    # The machine is ten times slower during the second pair: the ratios don't see it.
    pairs = Pairs(ours=(1.0, 10.0, 1.0), other=(2.0, 20.0, 3.0))
    assert pairs.ratios == [2.0, 2.0, 3.0]
    fields = pairs.fields()
    assert (fields["ratio"], fields["spread"], fields["repeats"]) == (2.0, (2.0, 3.0), 3)
    assert (fields["ours_s"], fields["other_s"]) == (1.0, 3.0)


def test_a_row_without_a_needed_field_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'x' lacks .*ratio, spread"):
        Result.of({"name": "x", "what": "y", "shape": "", "ours_s": 1, "other_s": 2, "other": "z"})


def test_unknown_fields_go_to_the_detail() -> None:
    assert row(tokens=5, detail={"a": 1}).detail == {"a": 1, "tokens": 5}


@pytest.mark.parametrize(("goal", "met"), [(None, None), (2.0, True), (2.1, False)])
def test_goals_are_met_or_not(goal: float | None, met: bool | None) -> None:
    assert row(2.0, goal=goal).met is met


def test_memory_is_compared_where_both_sides_were_measured() -> None:
    assert row().memory_share is None
    assert row(ours_mb=1.0, other_mb=4.0).memory_share == 0.25


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    stamped = stamp(**row(detail={"tokens": 3}).as_dict() | {"machine": {}, "date": "today"})
    write([stamped], tmp_path)
    assert read("speed", tmp_path) == [stamped]


def test_rows_that_were_not_measured_anew_stay(tmp_path: Path) -> None:
    write([row(2.0), row(3.0, what="another")], tmp_path)
    write([row(5.0)], tmp_path)
    assert {r.what: r.ratio for r in read("speed", tmp_path)} == {"a case": 5.0, "another": 3.0}


def test_a_study_is_no_comparison(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(json.dumps({"name": "study", "rows": [{"arm": "x"}]}))
    assert read("study", tmp_path) == []


def test_a_stamp_says_where_and_when() -> None:
    stamped = stamp(**{k: v for k, v in row().as_dict().items() if k not in ("machine", "date")})
    assert {"cpu", "cores", "memory_gb", "load"} <= set(harness.machine())
    assert stamped.date[:2] == "20"


def test_a_busy_machine_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (0.3, 9.0, 9.0))
    harness.warn_if_busy()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("os.getloadavg", lambda: (1.25, 0.0, 0.0))
    harness.warn_if_busy()
    assert "the load is 1.25" in capsys.readouterr().err


def test_a_failed_child_shows_its_last_words(tmp_path: Path) -> None:
    script = tmp_path / "side.py"
    script.write_text("raise SystemExit('no such weights')")
    with pytest.raises(RuntimeError, match=r"side\.py failed \(1\)[\s\S]*no such weights"):
        harness.run_child(["python3", script], 1, tmp_path / "log", timeout=60)
