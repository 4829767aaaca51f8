"""The golden runs as a test: one of them whole, and the comparison that `make golden` makes."""

from __future__ import annotations

import doctest
import json
import sys
from pathlib import Path
from typing import Any

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
    exact = stored["machine"] == golden.machine()
    lines, _ = golden.compare(stored["runs"], {"gspo": found}, exact=exact)
    if not exact and lines == [f"gspo: {golden.OTHER_TOKENS}"]:
        pytest.skip(golden.OTHER_TOKENS)
    assert lines == []


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


def curve(sampled: str = "s", loss: float = 0.5, share: float = 0.25) -> dict[str, Any]:
    """A run of one step."""
    step = {"loss/policy": loss, "ratio/clip_fraction": share, "moe/experts_changed": share}
    return {"steps": [step], "sampled": sampled, "weights": "w"}


NAMES = list(runs.CASES)[:10]
COMMITTED = dict.fromkeys(NAMES, curve())


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
def test_other_tokens_are_told_on_another_machine_and_fail_if_they_are_many(count: int) -> None:
    found = COMMITTED | dict.fromkeys(NAMES[:count], curve("t", loss=0.1))
    lines, failures = golden.compare(COMMITTED, found, exact=False)
    assert lines == [f"{name}: {golden.OTHER_TOKENS}" for name in NAMES[:count]]
    assert failures == (lines if count > 2 else [])
    lines, failures = golden.compare(COMMITTED, found, exact=True)
    assert lines == failures
    assert len(lines) == 2 * count  # on a machine of the same kind: the tokens and the loss


def test_other_tokens_hide_no_other_run() -> None:
    found = COMMITTED | {NAMES[0]: curve("t"), NAMES[1]: curve(loss=0.4)}
    lines, failures = golden.compare(COMMITTED, found, exact=False)
    assert len(lines) == 2
    assert failures == [f"{NAMES[1]}: step 1: loss/policy is 0.4, committed 0.5"]


def test_shares_may_move_a_little_on_another_machine() -> None:
    for share, moved in ((0.25 + 0.04, 0), (0.25 + 0.06, 2)):
        found = {NAMES[0]: curve(share=share)}
        assert len(golden.compare(COMMITTED, found, exact=False)[1]) == moved
        assert len(golden.compare(COMMITTED, found, exact=True)[1]) == 2


def test_a_run_without_a_curve_fails() -> None:
    for exact in (False, True):
        assert golden.compare({}, {NAMES[0]: curve()}, exact=exact)[1]


def test_an_unknown_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main(["gsop"]) == 2
    assert "gsop" in capsys.readouterr().out
