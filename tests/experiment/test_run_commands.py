"""The verbs that handle runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiment.small_runs import stored_run, trained_run
from gspo.backend.run import locked
from gspo.cli import app
from gspo.core.errors import RunError


def run(*arguments: object) -> str:
    """What a command prints; its error is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_runs_are_listed(tmp_path: Path):
    stored_run(tmp_path, "p/one")
    stored_run(tmp_path, "q/two", saved=())
    text = run("runs", tmp_path, "--json")
    assert "p/one" in text and "q/two" in text and "0.900 @2" in text
    told = json.loads(text.splitlines()[-1])
    assert [row["run"] for row in told] == ["p/one", "q/two"]
    with pytest.raises(RunError, match="no runs in"):
        run("runs", tmp_path / "nowhere")


def test_prune_keeps_best_and_latest(tmp_path: Path):
    folder = stored_run(tmp_path, saved=(0, 1, 2, 3))
    assert "p/r: deleted 0, 1; kept 2, 3" in run("prune", "r", "--path", tmp_path)
    assert saved(folder) == ["0002", "0003"]
    assert "deleted none" in run("prune", "r", "--path", tmp_path, "--keep", 2)


def test_a_locked_run_is_not_pruned(tmp_path: Path):
    folder = stored_run(tmp_path)
    with locked(folder / ".lock"), pytest.raises(RunError, match="is in use by process"):
        run("prune", "r", "--path", tmp_path)
    assert len(saved(folder)) == 3


def test_a_fork_begins_at_the_step(tmp_path: Path):
    trained_run(tmp_path)
    told = run("fork", "r", "second", "--path", tmp_path, "--step", 1)
    assert "goes on from step 1 of p/r" in told
    stored = json.loads((tmp_path / "p/second/config.json").read_text())
    assert stored["lineage"] == [{"run": "p/r", "step": 1}]
    assert saved(tmp_path / "p/second") == ["0001"]
    with pytest.raises(RunError, match="has the checkpoints of steps"):
        run("fork", "r", "second", "--path", tmp_path)
    with pytest.raises(RunError, match="no checkpoint of step 5: it has steps 1"):
        run("fork", "r", "third", "--path", tmp_path, "--step", 5)
    with pytest.raises(RunError, match="its base model"):
        run("fork", "r", "third", "--path", tmp_path, "--step", 0)

    told = run("export", "second", "--path", tmp_path, "--to", tmp_path / "out")
    assert "p/second, step 1, in " in told
    assert "from `p/r`, step 1" in (tmp_path / "out" / "README.md").read_text()
