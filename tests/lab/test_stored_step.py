"""A stored step: the batch and the weights of a run, or why they cannot be had."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gspo import dev
from gspo.backend import loading
from gspo.core.errors import CheckpointError, ModelError, RunError
from gspo.lab.stored_step import StoredStep
from lab.test_inspect_batch import a_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step; nothing of it may be changed."""
    return asyncio.run(a_run(tmp_path_factory.mktemp("run"), steps=1))


def test_the_last_step_is_taken_if_none_is_named(run: Path):
    step = StoredStep(run)
    assert (step.number, len(step.groups)) == (1, 3)
    assert step.weights_of("before") == "embedded:sort"
    assert step.weights_of("after") == "checkpoint 0001"
    with pytest.raises(RunError, match="has no batch of step 2: it has those of 1 to 1"):
        StoredStep(run, 2)


async def test_weights_of_another_version_are_refused(tmp_path: Path):
    """A call of train that failed half-way has moved the weights without a checkpoint."""
    run = await a_run(tmp_path)
    state = run / "checkpoints" / "0001" / "trainer.json"
    fields = json.loads(state.read_text()) | {"policy_version": 3}
    step = StoredStep(run, 2)
    record = step.record
    step.record = dataclasses.replace(record, policy_version=4)
    with pytest.raises(
        CheckpointError, match=r"policy version 4, but checkpoint 0001 is version 1"
    ):
        step.load("before")
    state.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"trainer\.json is damaged"):
        step.load("before")


def test_what_is_no_run_is_named(tmp_path: Path, run: Path):
    with pytest.raises(RunError, match=r"not the folder of a run.*<path>/<project>/<name>"):
        StoredStep(tmp_path)
    shutil.copy(run / "config.json", tmp_path)
    with pytest.raises(RunError, match="has not trained a step yet"):
        StoredStep(tmp_path)


def test_a_model_without_a_longest_context_can_be_inspected(run: Path):
    step = StoredStep(run, 1)
    step.record = dataclasses.replace(step.record, context=2**31)
    trainer = step.load("before")
    assert trainer.policy.context > 0 and trainer.step == 0


def test_code_of_the_models_folder_runs_only_if_the_run_allowed_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def load(source: str, config: dev.InternalModelConfig, **options: Any):
        if not config.trust_remote_code:
            raise ModelError("say so: dev.InternalModelConfig(trust_remote_code=True)")
        raise ModelError("loaded with trust")

    monkeypatch.setattr(loading, "load_policy", load)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    with pytest.raises(ModelError, match="say so"):
        StoredStep(copy, 1).load("before")
    for stored in ('{"task": "sort", "load": {"trust_remote_code": false}}', "[", "[1]"):
        (copy / "spec.json").write_text(stored)
        with pytest.raises(ModelError, match="say so"):
            StoredStep(copy, 1).load("before")
    (copy / "spec.json").write_text('{"task": "sort", "load": {"trust_remote_code": true}}')
    with pytest.raises(ModelError, match="loaded with trust"):
        StoredStep(copy, 1).load("before")
