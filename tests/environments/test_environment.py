"""How environments are named, made, and trained on from a run's file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from environments.scripted import Guess
from experiment.small_runs import Silent
from gspo.core.errors import ConfigError, MissingDependencyError
from gspo.environments import load_environment
from gspo.experiment.loop import run_experiment
from gspo.experiment.plan import make_plan
from gspo.experiment.run_file import read_spec
from gspo.experiment.spec import Spec

SCRIPTED = str(Path(__file__).parent / "scripted.py")


def test_an_environment_of_your_own_is_found_by_name_and_made_for_each_episode():
    make = load_environment(f"{SCRIPTED}:Guess", {"most": 3})
    first, second = make(), make()
    assert first is not second
    assert first.reset(0) == "1 to 3?"
    with pytest.raises(ConfigError, match=r"Known: bfcl:<name>.*textworld:<name>.*<module>:"):
        load_environment("nothing")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("textwold:house", {}, "cannot import textwold.*Did you mean 'textworld'"),
        ("textwurld", {}, "unknown environment 'textwurld'. Did you mean 'textworld'"),
        ("textwurld:house", {}, "cannot import textwurld"),
        (f"{SCRIPTED}:Gues", {}, "Did you mean 'Guess'"),
        (f"{SCRIPTED}:random", {}, "must be a class that derives from gspo.environments.Environ"),
        (f"{SCRIPTED}:Guess", {"mst": 3}, "unknown argument 'mst'. Did you mean 'most'"),
        ("gspo.environments:Environment", {}, "abstract"),
    ],
)
def test_mistakes_are_named(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        load_environment(name, options)


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch):
    for kind, told in (("textworld", r"-e '.\[textworld\]'"), ("verifiers", "--no-deps verifiers")):
        monkeypatch.setitem(sys.modules, kind, None)
        with pytest.raises(MissingDependencyError, match=rf"{kind}:house .*pip install {told}"):
            load_environment(f"{kind}:house")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"environment": "a:B", "task": "sort"}, "leave task, dataset, rollout out"),
        (
            {"environment": "a:B", "model": ""},
            "has a model of its own: give a model",
        ),
        ({"task": "sort", "max_turns": 3}, "max_turns is of an environment, but none is given"),
        ({"task": "sort", "environment_options": {"a": 1}}, "environment_options is of an env"),
        ({"task": "sort", "step_timeout": 3}, "step_timeout is of an environment"),
        ({}, "give a task, a dataset, an environment, or a rollout"),
    ],
)
def test_contradictions_in_a_file_are_named(fields: dict[str, Any], message: str):
    given: dict[str, Any] = {"model": "embedded:sort"} | fields
    with pytest.raises(ConfigError, match=message):
        Spec(**given)


RUN = """
environment = "scripted:Guess"
model = "embedded:sort"
steps = 1
prompts = 2
completions = 4
eval_prompts = 6
eval_completions = 1
max_turns = 2
environment_options = { most = 30 }
"""


async def test_a_file_names_an_environment_beside_it_and_trains_on_its_episodes(tmp_path: Path):
    (tmp_path / "scripted.py").write_text(Path(SCRIPTED).read_text())
    (tmp_path / "run.toml").write_text(RUN)
    spec = read_spec(tmp_path / "run.toml", [f"path={tmp_path}"])
    assert spec.environment == f"{tmp_path / 'scripted.py'}:Guess"
    assert "episodes of up to 2 turns" in make_plan(spec)
    outcome = await run_experiment(spec, watch := Silent())
    first, last, *_ = [
        json.loads(line) for line in (outcome.run / "metrics.jsonl").read_text().splitlines()
    ]
    assert first["val/turns"] == last["train/turns"] == 2
    assert watch.steps == [1]
    # six held-out episodes are of the few instances that are held out: these are what is counted
    assert 1 <= (watch.estimates[0].prompts or 0) < 6


def test_a_family_is_no_file_beside_the_run(tmp_path: Path):
    (tmp_path / "textworld.py").write_text("raise SystemExit")
    (tmp_path / "run.toml").write_text('environment = "textworld:house"\nmodel = "embedded:sort"')
    assert read_spec(tmp_path / "run.toml").environment == "textworld:house"


def test_an_environment_closes_without_a_word():
    assert Guess.__base__ is not None
    assert super(Guess, Guess()).close() is None
