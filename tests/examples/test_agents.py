"""The agents of examples/agents, as they stand, on an engine that answers by a script.

Their prompts are captured whole, calls and results included, and each rollout is one sample: what
the agent sends back extends what was sampled.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import gspo as art
from gspo.data.sample import trajectory_samples

AGENTS = Path(__file__).parents[2] / "examples" / "agents"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    """Imports an example as its own folder's script does."""
    monkeypatch.syspath_prepend(str(AGENTS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(AGENTS) in str(
            sys.modules[name].__file__
        ):
            del sys.modules[name]


def model_of_the_warehouse(prompt: str, index: int) -> str:
    """A model that asks the tool for both things, one after the other, and adds.

    It writes the arguments as few models do: what clients send back is spaced otherwise.
    """
    asked = re.findall(r"How many (\w+) and (\w+) are there", prompt)[-1]
    known = [int(n) for n in re.findall(r"<tool>(\d+)\n", prompt)]
    if len(known) < 2:
        call = json.dumps({"name": "stock", "arguments": {"thing": asked[len(known)]}}, indent=1)
        return f"I look.<tool_call>{call}</tool_call>"
    return f"{known[0]} and {known[1]} are {sum(known)}"


async def groups(rollout: Any) -> list[art.TrajectoryGroup]:
    async with art.FakeBackend(model_of_the_warehouse, port=0) as backend:
        model = art.TrainableModel(name="m", project="p", base_model="any")
        await model.register(backend)
        made = await art.gather_trajectory_groups(
            art.TrajectoryGroup(rollout(model, index) for _ in range(2)) for index in range(3)
        )
        assert (await model.train(made)).step == 1
    return made


@pytest.mark.parametrize("name", ["plain_openai", "langgraph_agent"])
async def test_an_agent_is_captured_whole(example: Any, name: str):
    if name == "langgraph_agent":
        pytest.importorskip("langgraph")
    for index, group in enumerate(await groups(example(name).rollout)):
        for t in group:
            task = example("warehouse").warehouse(index)
            assert t.reward == 1.0
            assert t.additional_histories == []
            roles = [message["role"] for message in t.messages()]
            assert roles == ["system", "user", *["assistant", "tool"] * 2, "assistant"]
            assert t.messages()[1]["content"] == task.question  # pyright: ignore
            assert t.tools and t.tools[0]["function"]["name"] == "stock"
            (sample,) = trajectory_samples(t)
            text = "".join(map(chr, sample.tokens[sample.ratio_mask]))
            assert text.count('"thing": ') == 2 and text.count("\0") == 3
