"""`gspo train` asks the engine for routes where training needs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiment.test_loop import Silent, small
from gspo import dev
from gspo.experiment.loop import run_experiment


@pytest.mark.parametrize("replay", ["rollout", "old_policy"])
async def test_a_run_with_replay_measures_its_routing(tmp_path: Path, replay: str):
    train = dev.TrainConfig(routing_replay=replay, measure_routing=True)  # pyright: ignore[reportArgumentType]
    await run_experiment(small(tmp_path, steps=1, train=train), Silent())
    text = (tmp_path / "gspo" / "run" / "metrics.jsonl").read_text()
    trained = next(line for line in map(json.loads, text.splitlines()) if "loss/policy" in line)
    assert trained["moe/routing_agreement"] == 1.0
    assert 0 <= trained["moe/experts_changed"] <= trained["moe/tokens_changed"] <= 1
    assert trained["moe/load_cv"] > 0
