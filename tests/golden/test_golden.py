"""The golden runs as a test: one of them whole, and the comparison that `make golden` makes."""

from __future__ import annotations

import doctest
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import runs

import golden


def test_doctests() -> None:
    assert doctest.testmod(golden).failed == 0


def test_every_run_has_a_curve_in_which_something_happens() -> None:
    stored = json.loads(golden.CURVES.read_text())["runs"]
    assert list(stored) == list(runs.CASES)
    for name, curve in stored.items():
        assert len(curve["steps"]) == runs.STEPS, name
        norms = {step["optim/grad_norm"] for step in curve["steps"]}
        assert len(norms) == runs.STEPS and min(norms) > 0, name
    # A run that was closed and opened again ends in the same weights; no other two do.
    assert stored["resumed"] == stored["gspo"]
    assert len({curve["weights"] for curve in stored.values()}) == len(stored) - 1


async def test_one_run_whole(tmp_path: Path) -> None:
    stored = json.loads(golden.CURVES.read_text())
    base = runs.make_base("dense", tmp_path / "base")
    found = await runs.run("gspo", base, tmp_path)
    tolerance = 0.0 if stored["machine"] == golden.machine() else 1e-6
    assert list(golden.differences(stored["runs"]["gspo"], found, tolerance)) == []


def test_what_moved_is_named() -> None:
    old = {"steps": [{"a": 1.0, "b": 2.0}], "weights": "x", "sampled": "s"}
    assert list(golden.differences(old, old, 0.0)) == []
    moved = {"steps": [{"a": 1.0 + 1e-7, "c": 2.0}], "weights": "y", "sampled": "s"}
    assert list(golden.differences(old, moved, 0.0)) == [
        f"step 1: a is {1.0 + 1e-7}, committed 1.0",
        "step 1: b is gone",
        "step 1: c is new",
        "weights is y, committed x",
    ]
    assert len(list(golden.differences(old, moved, 1e-6))) == 2  # on another machine: b and c
    other_tokens = old | {"sampled": "t"}
    assert list(golden.differences(old, other_tokens, 1e-6)) == ["sampled is t, committed s"]


def test_an_unknown_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main(["gsop"]) == 2
    assert "gsop" in capsys.readouterr().out
