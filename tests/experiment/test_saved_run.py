"""Runs by name, and the step that is meant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from experiment.small_runs import stored_run
from gspo.core.errors import ConfigError, RunError
from gspo.experiment.run_file import flat
from gspo.experiment.saved_run import SavedRun, find_run, find_runs, load_named, read_run
from gspo.experiment.spec import Spec


def test_a_run_is_found_by_its_folder_and_its_names(tmp_path: Path, monkeypatch):
    folder = stored_run(tmp_path)
    stored_run(tmp_path, "p/other", saved=())
    for name in (str(folder), "p/r", "r"):
        run = find_run(name, tmp_path)
        assert (run.name, run.base_model) == ("p/r", "embedded:sort")
        assert run.spec is not None and run.load == run.spec.load
    monkeypatch.chdir(folder)
    assert find_run(".", "nowhere").name == "p/r"
    for path in (tmp_path, tmp_path / "p", folder):
        assert "p/r" in [run.name for run in find_runs(path)]
    assert len(find_runs(tmp_path)) == 2


def test_a_run_that_is_not_there_names_the_near_ones(tmp_path: Path):
    with pytest.raises(RunError, match=r"no run 'x' in .*There are none at all"):
        find_run("x", tmp_path)
    stored_run(tmp_path, "demo/sort-1")
    with pytest.raises(RunError, match=r"Did you mean '.*sort-1'\? Runs there: demo/sort-1\."):
        find_run("sort-2", tmp_path)
    with pytest.raises(RunError, match=r"Did you mean 'demo/sort-1'\?"):
        find_run("dmeo/sort-1", tmp_path)
    stored_run(tmp_path, "else/sort-1")
    with pytest.raises(RunError, match=r"several runs .* demo/sort-1, else/sort-1"):
        find_run("sort-1", tmp_path)


def test_best_latest_and_numbers(tmp_path: Path):
    run = find_run("r", tmp_path) if stored_run(tmp_path) else None
    assert run is not None
    assert [run.step(wanted) for wanted in ("best", "latest", "1", "0")] == [2, 3, 1, 0]
    with pytest.raises(RunError, match=r"no checkpoint of step 7: it has steps 1, 2 \(best\), 3"):
        run.step("7")
    with pytest.raises(ConfigError, match="'newest': give best, latest, or a number"):
        run.step("newest")


def test_best_is_the_best_that_is_saved_and_measured(tmp_path: Path):
    run = read_run(stored_run(tmp_path, saved=(1, 3)))
    assert run is not None and run.step("best") == 1  # 2 is better, and gone
    (run.folder / "metrics.jsonl").unlink()
    run = SavedRun.of(run.folder)
    with pytest.raises(RunError, match="no held-out reward at any saved step"):
        run.step("best")
    shutil.rmtree(run.folder / "checkpoints")
    with pytest.raises(RunError, match="has no checkpoint: it has none at all"):
        run.step("latest")


def test_a_spec_that_this_gspo_doesnt_understand_is_left_out(tmp_path: Path):
    folder = stored_run(tmp_path, lora={"r": 4, "alpha": 8.0, "target_modules": "all-linear"})
    (folder / "spec.json").write_text('{"of_another_gspo": 1}')
    run = read_run(folder)
    assert run is not None and run.spec is None
    assert run.load.lora is not None and run.load.lora.r == 4


def test_a_checkpoint_that_is_deleted_while_it_is_read(tmp_path: Path):
    run = read_run(stored_run(tmp_path))
    assert run is not None
    with pytest.raises(RunError, match="was deleted while it was read"), run.reading(1) as folder:
        shutil.rmtree(folder)
        raise FileNotFoundError
    with pytest.raises(FileNotFoundError), run.reading(2):
        raise FileNotFoundError


def test_what_is_no_run_has_no_steps(tmp_path: Path):
    with pytest.raises(ConfigError, match="only a run has steps"):
        load_named("embedded:sort", "1", str(tmp_path))
    with pytest.raises(RunError, match="or name a model"):
        load_named("nothing", None, str(tmp_path))


def test_options_that_are_not_the_defaults_are_known(tmp_path: Path):
    spec = Spec(task="sort", train={"precalculate_logprobs": True, "epochs": 2}, seed=3)  # pyright: ignore[reportArgumentType]
    stored = json.loads(json.dumps(spec.model_dump(mode="json")))
    run = SavedRun(tmp_path, {}, flat(stored))
    train = {"train.precalculate_logprobs", "train.old_logprobs", "train.epochs"}
    assert run.given.keys() == {"task", "model", "seed"} | train
    assert run.given["train.epochs"] == 2
