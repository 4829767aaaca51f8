"""The demo takes up its own unfinished run, and touches no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiment.small_runs import Silent
from gspo.experiment.demo import demo_spec
from gspo.experiment.loop import run_experiment


async def test_the_demo_goes_on_where_it_stopped_and_else_starts_anew(tmp_path: Path):
    path = str(tmp_path)
    first = demo_spec(path, steps=2)
    assert first.name == "sort-1"
    small_first = first.model_copy(update={"prompts": 2, "completions": 4, "eval_prompts": 4})
    await run_experiment(small_first, Silent())
    assert demo_spec(path, steps=2).name == "sort-2"
    assert demo_spec(path, steps=1).name == "sort-2"
    half = tmp_path / "demo" / "sort-2"
    (half / "checkpoints" / "0001").mkdir(parents=True)
    (half / "spec.json").write_text(
        json.dumps(demo_spec(path, 2).model_dump(mode="json") | {"name": "sort-2"})
    )
    assert demo_spec(path, steps=2).name == "sort-2"
    assert demo_spec(path, steps=2, seed=1).name == "sort-3"


def test_the_demo_finds_its_earlier_run_below_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x" / "demo" / "sort-1").mkdir(parents=True)
    assert demo_spec("~/x").name == "sort-2"
