"""The agents of examples/agents, as they stand, on the model that the package builds.

Each is captured by the base URL of its episode, whole: what it sends back extends what was sampled.
"""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gspo as art
from gspo.data.sample import TrajectorySamples, trajectory_samples
from gspo.serve import torch_engine
from gspo.serve.engine import Completion
from gspo.train import minibatches

AGENTS = Path(__file__).parents[2] / "examples" / "agents"
PACKAGES = {
    "plain": "openai",
    "langgraph": "langgraph",
    "agents-sdk": "agents",
    "agents-sdk-chats": "agents",
    "pydantic-ai": "pydantic_ai",
}


@pytest.fixture
def lookup(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """examples/agents/train_lookup.py, imported as a script of its folder is."""
    monkeypatch.syspath_prepend(str(AGENTS))
    before = set(sys.modules)
    yield importlib.import_module("train_lookup")
    for name in set(sys.modules) - before:
        if str(AGENTS) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def need(agent: str) -> None:
    """Skip where what an agent is written for is not installed."""
    if agent != "node":
        pytest.importorskip(PACKAGES[agent])
    elif shutil.which("node") is None:
        pytest.skip("node is not installed")
    elif not (AGENTS / "node" / "node_modules" / "openai").exists():
        pytest.skip("node's package openai is not installed: make node")


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """What the engine samples from here on."""
    tokens: list[tuple[int, ...]] = []

    def completion(**fields: Any) -> Completion:
        tokens.append(tuple(fields["token_ids"]))
        return Completion(**fields)

    monkeypatch.setattr(torch_engine, "Completion", completion)
    return tokens


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TrajectorySamples]:
    """What the trainer makes of trajectories from here on."""
    made: list[TrajectorySamples] = []

    def samples(*args: Any, **options: Any) -> TrajectorySamples:
        made.append(trajectory_samples(*args, **options))
        return made[-1]

    monkeypatch.setattr(minibatches, "trajectory_samples", samples)
    return made


@pytest.mark.parametrize("agent", [*PACKAGES, "node"])
async def test_an_agent_is_captured_whole(
    lookup: Any, agent: str, tmp_path: Path, sampled: list, trained: list
):
    need(agent)
    async with art.LocalBackend(path=tmp_path, port=0) as backend:
        model = art.TrainableModel(name="m", project="p", base_model="embedded:lookup")
        await model.register(backend)
        sampled.clear()  # what the engine's first tests have sampled
        (group,) = await lookup.groups(model, lookup.agent_named(agent), "train", range(1), 2)
        drawn = list(sampled)
        assert (await model.train([group])).step == 1

    recorded = []
    for t, samples in zip(group, trained, strict=True):
        assert t.additional_histories == []
        assert [m["role"] for m in t.messages()] == ["user", "assistant", "tool", "assistant"]
        assert t.messages()[2]["content"] in set("abcdefghij")  # the tool was called, for a digit
        assert t.tools and t.tools[0]["function"]["name"] == "look_up"
        choices: list[Any] = [m for m in t.messages_and_choices if not isinstance(m, dict)]
        recorded += [tuple(choice.token_ids) for choice in choices]
        (sample,) = samples
        tokens = [token for choice in choices for token in choice.token_ids]
        assert sample.tokens[sample.ratio_mask].tolist() == tokens
    assert len(recorded) == 4 and sorted(recorded) == sorted(drawn)


def test_the_agents_know_nothing_of_gspo():
    for file in (*AGENTS.glob("*.py"), AGENTS / "node" / "agent.mjs"):
        if file.name != "train_lookup.py":
            assert not re.search(r"(import|from) gspo", file.read_text()), file


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("agent", ["plain", "pydantic-ai"])
async def test_an_agent_learns(lookup: Any, agent: str, tmp_path: Path):
    """Measured: from 0.24 to 0.66 in 24 steps, docs/agents.md."""
    need(agent)
    before, after = await lookup.train(str(tmp_path), lookup.agent_named(agent), steps=16)
    assert before.mean < 0.4
    assert after.low > before.high + 0.05
