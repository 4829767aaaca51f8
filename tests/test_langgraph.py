"""ART's names for LangGraph agents."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest

import gspo as art
from gspo.core.errors import ConfigError, MissingDependencyError
from gspo.langgraph import init_chat_model, wrap_rollout

pytest.importorskip("langchain_openai")


async def test_a_rollout_is_given_what_its_agent_asked():
    model = art.TrainableModel(name="m", project="p", base_model="any")
    async with art.FakeBackend() as backend:
        await model.register(backend)

        async def rollout(task: str, **config: Any) -> art.Trajectory:
            answer = await init_chat_model(**config).ainvoke(task)
            return art.Trajectory(reward=len(answer.text), metadata={"task": task})

        trajectory = await wrap_rollout(model, rollout)("hi", temperature=0.5)
    (request,) = backend.engine.requests
    assert request.params.temperature == 0.5
    (choice,) = trajectory.choices()
    assert trajectory.messages()[0] == {"role": "user", "content": "hi"}
    assert len(choice.message.content or "") == trajectory.reward
    assert trajectory.metadata == {"task": "hi"}


async def test_tools_are_bound_and_their_calls_read():
    model = art.TrainableModel(name="m", project="p", base_model="any")
    call = '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>'

    def add(a: int) -> int:
        """Add."""
        return a

    async with art.FakeBackend() as backend:
        await model.register(backend)
        backend.engine.reply = lambda prompt, index: call
        with art.trajectory(model) as t:
            answer = await init_chat_model().bind_tools([add]).ainvoke("2?")
    (asked,) = answer.tool_calls
    assert (asked["name"], asked["args"]) == ("add", {"a": 2})
    assert t.tools and t.choices()[0].finish_reason == "tool_calls"


async def test_blocking_calls_go_to_the_port():
    model = art.TrainableModel(name="m", project="p", base_model="any")
    async with art.FakeBackend(port=0) as backend:
        await model.register(backend)

        async def rollout() -> int:
            chat = init_chat_model()
            answer = await asyncio.to_thread(chat.invoke, "hi")
            chat.root_client.close()
            return len(answer.text)

        trajectory = await wrap_rollout(model, rollout)()
    (choice,) = trajectory.choices()
    assert len(choice.message.content or "") == trajectory.reward


def test_outside_of_a_rollout_there_is_no_model():
    with pytest.raises(ConfigError, match="nothing is recorded here"):
        init_chat_model()
    with art.trajectory(), pytest.raises(ConfigError, match=r"art.trajectory\(model\)"):
        init_chat_model()


def test_without_langchain_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "langchain_openai", None)
    model = art.Model(name="m", project="p")
    with art.trajectory(model), pytest.raises(MissingDependencyError, match=r"\[langgraph\]"):
        init_chat_model()
