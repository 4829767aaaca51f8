"""`model.metrics_builder()` and what judges cost (`gspo.metrics`)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import gspo as art
from gspo.core.errors import ConfigError, DataError
from gspo.metrics import MetricsBuilder, track_api_cost


def answer(prompt: int, completion: int) -> Any:
    return SimpleNamespace(
        usage=SimpleNamespace(prompt_tokens=prompt, completion_tokens=completion)
    )


async def test_what_is_collected_is_written_by_the_next_log(tmp_path: Path):
    @track_api_cost(source="judge/right", provider="openai", model_name="gpt-x")
    async def judge(prompt: int, completion: int) -> Any:
        await asyncio.sleep(0)
        return answer(prompt, completion)

    model = art.Model(name="m", project="p")
    async with art.LocalBackend(tmp_path) as backend:
        await model.register(backend)
        builder = model.metrics_builder()
        builder.register_model_pricing(
            "openai/gpt-x", prompt_per_million=2.0, completion_per_million=8.0
        )
        with builder.measure("time/step_actor_s"):
            await asyncio.sleep(0.01)
        builder.add_data(step_num_scenarios=3, step_actor_tokens=70)
        builder.add_idle_times(step_actor_idle_s=1.5)
        with model.metrics_builder("train").activate_context():
            await asyncio.gather(judge(1_000_000, 0), judge(0, 500_000))
        with model.metrics_builder("eval").activate_context():
            await judge(500_000, 0)
        await judge(10**9, 0)  # outside of a context: not counted
        with pytest.raises(DataError, match="metric"):
            await model.log(metrics={"bad": None}, step=1)  # type: ignore[dict-item]
        await model.log(metrics={"mine": 1.0}, step=1)
        await model.log(metrics={"mine": 2.0}, step=2)
    first, second = map(
        json.loads, (tmp_path / "p" / "m" / "metrics.jsonl").read_text().splitlines()
    )
    assert 0.01 <= first.pop("time/step_actor_s") < 5
    assert first == {
        "step": 1,
        "data/step_num_scenarios": 3.0,
        "data/step_actor_tokens": 70.0,
        "time/step_actor_idle_s": 1.5,
        "costs/train/judge/right": 6.0,
        "costs/train": 6.0,
        "costs/eval/judge/right": 1.0,
        "costs/eval": 1.0,
        "costs/all": 7.0,
        "val/mine": 1.0,
    }
    assert second == {"step": 2, "val/mine": 2.0}


def test_functions_that_are_not_async_and_anthropics_names_are_counted():
    @track_api_cost(
        source="judge",
        model_name="x",
        response_getter=lambda pair: pair[1],
        prompt_price_per_million=1.0,
        completion_price_per_million=2.0,
    )
    def judge() -> Any:
        return "text", {"usage": {"input_tokens": 1e6, "output_tokens": 1e6}}

    builder = MetricsBuilder()
    with builder.activate_context():
        judge()
    assert builder.take() == {"costs/train/judge": 3.0, "costs/train": 3.0, "costs/all": 3.0}


async def test_what_cannot_be_counted_is_said_before_it_is_paid_for():
    asked = []

    @track_api_cost(source="judge", model_name="gpt-x")
    async def judge() -> Any:
        asked.append(1)
        return "no usage"

    builder = MetricsBuilder()
    with builder.activate_context():
        with pytest.raises(ConfigError, match=r"what does 'gpt-x' cost\? .*register_model_pricing"):
            await judge()
        assert not asked
        builder.register_model_pricing("gpt-x", prompt_per_million=1, completion_per_million=1)
        with pytest.raises(DataError, match=r"what 'judge' returned has no usage"):
            await judge()
    with pytest.raises(ConfigError, match=r"metrics_builder\('test'\): give one of"):
        builder.of("test")
    with pytest.raises(DataError, match="metric 'a' is True"):
        builder.add_metric("a", True)
