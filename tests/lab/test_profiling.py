"""`--profile`: rows that add up, and a run that computes what it does without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiment.test_loop import Silent, records, small
from gspo.core.timing import Clock, timing
from gspo.experiment.loop import run_experiment
from gspo.lab.profiling import make_report, render, step_clock, write_profile

PHASES = ("sampling", "rollout", "packing", "forward", "head", "backward", "optimizer", "publish")
PHASES += ("checkpoint",)


async def profiled(path: Path, **fields: Any) -> tuple[Path, dict[str, Any]]:
    clock = step_clock()
    with timing(clock):
        outcome = await run_experiment(small(path, **fields), Silent())
    return outcome.run, make_report(clock)


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {phase["name"]: phase for phase in report["phases"]}


def test_a_phase_is_charged_without_what_is_inside_it():
    at = iter([0.0, 1.0, 3.0, 6.0, 7.0, 8.0])
    clock = Clock(now=lambda: next(at))
    with clock.span("step"), clock.span("forward"), clock.span("head"):
        pass
    report = make_report(clock)
    assert (report["steps"], report["seconds"]) == (1, 8.0)
    assert report["phases"] == [
        {"name": "forward", "seconds": 3.0, "share": 0.375, "calls": 1},
        {"name": "head", "seconds": 3.0, "share": 0.375, "calls": 1},
        {"name": "other", "seconds": 2.0, "share": 0.25, "calls": 1},
    ]


async def test_the_phases_add_up_to_the_steps(tmp_path: Path):
    run, report = await profiled(tmp_path)
    phases = by_name(report)
    assert set(phases) == {*PHASES, "other"} and list(phases)[-1] == "other"
    assert sum(p["seconds"] for p in phases.values()) == pytest.approx(report["seconds"])
    assert sum(p["share"] for p in phases.values()) == pytest.approx(1.0)
    assert all(p["seconds"] > 0 for p in phases.values())
    # Evaluations, before and after, are no part of a step.
    assert report["steps"] == phases["sampling"]["calls"] == phases["rollout"]["calls"] == 3
    calls = [phases[name]["calls"] for name in ("optimizer", "backward", "forward")]
    assert len(set(calls)) == 1
    assert phases["checkpoint"]["calls"] == 6  # the batch and the weights
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {k: sum(line.get(k, 0.0) for line in lines) for k in ("time/step", "time/rollout")}
    # Measured inside the step, and around the rollout.
    assert report["seconds"] >= logged["time/step"] > logged["time/rollout"]
    assert logged["time/rollout"] >= phases["rollout"]["seconds"] + phases["sampling"]["seconds"]


async def test_threads_that_train_side_by_side_share_the_time(tmp_path: Path):
    """The profiled run computes as the plain one does, to the bit, and its phases still add up."""
    fields: dict[str, Any] = {
        "steps": 2,
        "load": {"threads": 2},
        "train": {"packed_sequence_length": 64, "share_prefixes": False},
    }
    plain = (await run_experiment(small(tmp_path / "plain", **fields), Silent())).run
    run, report = await profiled(tmp_path / "timed", **fields)
    weights = "checkpoints/0002/model.safetensors"
    assert (plain / weights).read_bytes() == (run / weights).read_bytes()
    assert records(plain) == records(run)
    phases = by_name(report)
    assert sum(p["seconds"] for p in phases.values()) == pytest.approx(report["seconds"])
    assert phases["backward"]["calls"] > phases["optimizer"]["calls"] > 0  # several microbatches


async def test_files_and_text(tmp_path: Path):
    run, report = await profiled(tmp_path, steps=1)
    text = render(report)
    path = write_profile(report, run)
    assert json.loads(path.read_text()) == report
    assert (run / "profile.txt").read_text() == text
    lines = text.splitlines()
    assert lines[0] == "profile, per step of 1"
    for name in (*PHASES, "other", "step"):
        assert any(line.split()[:1] == [name] for line in lines), name
    assert all(len(line) <= 100 for line in lines)


def test_a_run_without_a_step_has_nothing_to_profile(tmp_path: Path):
    report = make_report(step_clock())
    assert report == {"steps": 0, "seconds": 0, "phases": []}
    assert "nothing to profile" in render(report)
    assert json.loads(write_profile(report, tmp_path).read_text()) == report
