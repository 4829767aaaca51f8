"""A run that begins with another one's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gspo as art
from gspo.core.errors import CheckpointError, ConfigError, RunError
from support import random_groups

ONE = art.dev.TrainConfig(minibatches=1)


def model_named(name: str, base_model: str = "embedded:sort") -> art.TrainableModel:
    config = art.dev.InternalModelConfig(exact=False)
    return art.TrainableModel(
        name=name, project="p", base_model=base_model, _internal_config=config
    )


async def trained(backend: art.LocalBackend, name: str, steps: int) -> art.TrainableModel:
    model = model_named(name)
    await model.register(backend)
    for step in range(steps):
        groups = random_groups(backend.policy(model), groups=1, size=2, seed=step)
        await model.train(groups, _config=ONE)
    return model


def weights(backend: art.LocalBackend, model: art.TrainableModel) -> list[torch.Tensor]:
    return [p.detach().clone() for p in backend.policy(model).lm.parameters()]


async def test_a_fork_goes_on_as_the_run_that_it_is_of(tmp_path: Path, capsys: Any):
    async with art.LocalBackend(tmp_path) as backend:
        old = await trained(backend, "old", 2)
        fork, early = model_named("fork"), model_named("early")
        await backend.fork_checkpoint(fork, from_model="old", verbose=True)
        assert capsys.readouterr().out == "fork goes on from step 2 of old\n"
        await backend._experimental_fork_checkpoint(early, from_model="old", not_after_step=1)
        await fork.register(backend)
        await early.register(backend)
        assert [await fork.get_step(), await early.get_step()] == [2, 1]
        groups = random_groups(backend.policy(old), groups=1, size=2, seed=9)
        for model in (old, fork):  # the optimizer came with it
            assert (await model.train(groups, _config=ONE)).step == 3
        pairs = zip(weights(backend, old), weights(backend, fork), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


async def test_forks_that_cannot_be(tmp_path: Path):
    async with art.LocalBackend(tmp_path) as backend:
        old = await trained(backend, "old", 1)
        cases: tuple[tuple[art.TrainableModel, dict[str, Any], str], ...] = (
            (model_named("a"), {"from_model": "none"}, r"has no checkpoint: it has none at all"),
            (
                model_named("a"),
                {"from_model": "old", "not_after_step": 0},
                r"no checkpoint up to step 0: it has the steps \[1\]",
            ),
            (model_named("a", "embedded:add"), {"from_model": "old"}, "fits only the model"),
            (old, {"from_model": "old"}, "fork before register"),
        )
        for model, options, message in cases:
            with pytest.raises(RunError, match=message):
                await backend.fork_checkpoint(model, **options)
        with pytest.raises(
            ConfigError, match="'from_s3_bucket' is not supported: a run is a folder"
        ):
            await backend.fork_checkpoint(model_named("a"), "old", from_s3_bucket="b")  # pyright: ignore[reportCallIssue]
        with pytest.raises(ConfigError, match=r"'from_modle'.* Did you mean 'from_model'"):
            await backend.fork_checkpoint(model_named("a"), from_modle="old")  # pyright: ignore[reportCallIssue]
        with pytest.raises(ConfigError, match="give from_model="):
            await backend.fork_checkpoint(model_named("a"))
        await backend.fork_checkpoint(model_named("b"), "old")
        with pytest.raises(RunError, match=r"checkpoints of steps \[1\] already"):
            await backend.fork_checkpoint(model_named("b"), "old")
        weights = next((tmp_path / "p" / "old" / "checkpoints").glob("*/model.safetensors"))
        weights.write_bytes(b"x" + weights.read_bytes()[1:])
        with pytest.raises(CheckpointError, match="damaged"):
            await backend.fork_checkpoint(model_named("c"), "old")
        assert not (tmp_path / "p" / "c" / "checkpoints").exists()


async def test_a_fork_knows_its_lineage(tmp_path: Path):
    async with art.LocalBackend(tmp_path) as backend:
        await trained(backend, "first", 1)
    async with art.LocalBackend(tmp_path) as backend:
        await backend.fork_checkpoint(model_named("second"), "first")
        await backend.fork_checkpoint(model_named("third"), "second")
    stored = json.loads((tmp_path / "p/third/config.json").read_text())
    assert stored["lineage"] == [{"run": "p/first", "step": 1}, {"run": "p/second", "step": 1}]
    assert "lineage" not in json.loads((tmp_path / "p/first/config.json").read_text())
