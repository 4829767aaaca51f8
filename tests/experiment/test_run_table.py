"""The table of runs."""

from __future__ import annotations

from pathlib import Path

from experiment.small_runs import stored_run
from gspo.experiment.run_table import describe_run, runs_text
from gspo.experiment.saved_run import read_run


def test_a_run_is_described(tmp_path: Path):
    parents = [{"run": "p/first", "step": 5}]
    run = read_run(stored_run(tmp_path, lineage=parents))
    assert run is not None
    told = describe_run(run)
    assert (told["method"], told["step"], told["steps"], told["saved"]) == ("gspo", 3, 3, [1, 2, 3])
    assert (told["reward_best"], told["best_step"], told["reward_last"]) == (0.9, 2, 0.4)
    assert told["bytes"] > 1000 and told["running"] is False and told["lineage"] == parents

    text = runs_text([told], 120)
    assert "p/r (from p/first @5)" in text and "0.900 @2" in text


def test_a_run_with_nothing_in_it_yet(tmp_path: Path):
    folder = tmp_path / "p" / "r"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"format": 1, "base_model": null}')
    run = read_run(folder)
    assert run is not None
    told = describe_run(run)
    assert (told["method"], told["step"], told["reward_best"]) == (None, 0, None)
    assert "p/r" in runs_text([told], 120)


def test_a_run_of_sft_says_so(tmp_path: Path):
    folder = stored_run(tmp_path)
    (folder / "trajectories/train/0003.parquet").unlink()
    (folder / "metrics.jsonl").write_text('{"step": 1, "sft/loss_last": 0.5}\n')
    run = read_run(folder)
    assert run is not None and run.method == "sft"
