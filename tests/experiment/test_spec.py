from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gspo import dev
from gspo.core.errors import ConfigError
from gspo.core.options import TEMPERATURES
from gspo.data.turn import read_fields
from gspo.experiment.spec import Spec
from gspo.serve.engine import SamplingParams
from support import choice


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "sort", "epsilon": 1}, r"'epsilon' in train, as \[train\] or train=\{...\}\?$"),
        ({"task": "sortt"}, r"Did you mean 'sort'\?$"),
        ({"task": "sort", "name": ""}, "the run: name = '': .*1 to 255 bytes"),
        ({"task": "sort", "path": "a\0b"}, "path = .*NUL"),
        ({"task": "sort", "name": "a/b"}, "name = 'a/b': must name a folder"),
        ({"task": "sort", "project": ".."}, r"project = .*no .*'\.\.'"),
        ({"task": "sort", "name": "x" * 256}, "name = 'x.*1 to 255 bytes"),
        (
            {"task": "sort", "pipeline": True, "train": {"max_staleness": 0}},
            "max_staleness = 0 trains on nothing that was: leave one",
        ),
    ],
)
def test_what_names_nothing_is_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        Spec(**fields)


def test_the_home_folder_is_meant_in_a_path_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    spec = Spec(task="sort", name="~", project="~", path="~/runs")
    assert spec.folder == Path("/home/me/runs/~/~")


def test_half_a_character_is_no_name():
    for field in ("name", "project", "path"):
        with pytest.raises(ConfigError, match=f"{field} = .*half a character"):
            fields: dict[str, Any] = {"task": "sort", field: "a\ud800"}
            Spec(**fields)


def test_the_home_folder_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert Spec(task="sort", path="~/runs").path == "/home/me/runs"


@pytest.mark.parametrize(
    "spec",
    [
        Spec(task="sort", train=dev.TrainConfig(lr_schedule="linear", lr_total_steps=60)),
        Spec(rollout="mine:answer", model="embedded:sort", load=dev.InternalModelConfig(threads=1)),
    ],
    ids=("task", "rollout"),
)
def test_a_spec_that_was_dumped_whole_can_be_read_back(spec: Spec):
    """As `spec.json` of a run folder."""
    assert Spec(**json.loads(spec.model_dump_json())) == spec


def test_a_temperature_that_no_engine_samples_at_is_refused_before_the_run():
    with pytest.raises(ConfigError, match=r"temperature = 0\.0005"):
        Spec(task="sort", temperature=0.0005)
    for limit in TEMPERATURES:
        assert SamplingParams(temperature=Spec(task="sort", temperature=limit).temperature)
        row = choice([3], temperature=limit)
        assert read_fields(row, "here").temperature == limit


def test_rollouts_run_ahead_only_where_it_was_asked_for():
    train = dev.TrainConfig(max_staleness=3)
    specs = (Spec(task="sort", train=train), Spec(task="sort", pipeline=True, train=train))
    assert [spec.steps_ahead for spec in specs] == [0, 3]
