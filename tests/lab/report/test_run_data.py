"""What the report reads of a run's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gspo.backend.run import Run
from gspo.core.errors import RunError
from gspo.experiment.run_file import flat
from gspo.experiment.spec import Spec
from gspo.lab.report.run_data import changed, read_runs, resolved
from lab.report.report_cases import run_folder


def test_stored_specs_are_resolved_as_they_were_meant():
    spec = Spec(task="sort", train={"precalculate_logprobs": True, "epochs": 2}, seed=3)  # pyright: ignore[reportArgumentType]
    stored = json.loads(json.dumps(spec.model_dump(mode="json")))
    settings = resolved(stored)
    assert settings is not None
    assert (settings.algorithm, settings.old_logprobs) == ("gspo", "trainer")
    train = {"train.precalculate_logprobs", "train.old_logprobs", "train.epochs"}
    assert changed(flat(stored)) == {"seed"} | train
    assert resolved(stored | {"train": {"from_the_future": 1}}) is None


def test_runs_of_one_name_are_told_apart(tmp_path: Path):
    one, again = run_folder(tmp_path, "one"), run_folder(tmp_path / "elsewhere", "one")
    names = [run.label for run in read_runs([one, again])]
    assert names == [str(one), str(again)]


def test_a_run_alive_is_known_by_its_lock(tmp_path: Path):
    folder = run_folder(tmp_path)
    run = Run(tmp_path, "p", "m", {"base_model": "embedded:sort", "lora": None})
    try:
        assert read_runs([folder])[0].running
    finally:
        run.close()
    assert not read_runs([folder])[0].running


def test_what_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(RunError, match=r"neither metrics\.jsonl nor config\.json"):
        read_runs([tmp_path / "nowhere"])
