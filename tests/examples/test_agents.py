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

import numpy as np
import pytest

import gspo as art
from gspo.data.sample import trajectory_samples
from gspo.tasks import load_task

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


@pytest.mark.parametrize("agent", [*PACKAGES, "node"])
async def test_an_agent_is_captured_whole(lookup: Any, agent: str, tmp_path: Path):
    need(agent)
    async with art.LocalBackend(path=tmp_path, port=0) as backend:
        model = art.TrainableModel(name="m", project="p", base_model="embedded:lookup")
        await model.register(backend)
        (group,) = await lookup.groups(model, lookup.agent_named(agent), "train", range(1), 2)
        result = await model.train([group])
    print([t.messages() for t in group], result.metrics)


def test_the_agents_know_nothing_of_gspo():
    for file in (*AGENTS.glob("*.py"), AGENTS / "node" / "agent.mjs"):
        if file.name != "train_lookup.py":
            assert not re.search(r"(import|from) gspo", file.read_text()), file
