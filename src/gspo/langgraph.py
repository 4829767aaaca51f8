"""LangGraph agents under ART's names: `wrap_rollout` and `init_chat_model`.

async def rollout(scenario):
    agent = create_agent(init_chat_model(), tools)
    await agent.ainvoke({"messages": [("user", scenario)]})
    return art.Trajectory(reward=1.0)

trajectory = await wrap_rollout(model, rollout)(scenario)
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, ParamSpec

from gspo.capture import AnyModel, CapturedTrajectory, auto_trajectory, trajectory
from gspo.core.byname import optional
from gspo.core.errors import ConfigError

if TYPE_CHECKING:
    from langchain_openai import ChatOpenAI

P = ParamSpec("P")


def wrap_rollout(model: AnyModel, fn: Callable[P, Awaitable[Any]]) -> Callable[P, Any]:
    """A rollout that records what its agents ask of the model: `art.trajectory(model)(fn)`."""
    return trajectory(model)(fn)


def init_chat_model(model: str | None = None, **options: Any) -> ChatOpenAI:
    """A chat model of LangChain, whose calls are recorded in the rollout that makes it.

    Its async methods, such as `ainvoke`, go through the model's own client; the others need a
    port: `LocalBackend(port=0)`.

    Args:
        model: its name for the server; None: the rollout's model.
        options: more arguments of `ChatOpenAI`; temperature is 1.0 unless given.

    Raises:
        ConfigError: outside of `wrap_rollout` or `art.trajectory(model)`.
        MissingDependencyError: langchain-openai is not installed.
    """
    captured = auto_trajectory(required=True)
    assert isinstance(captured, CapturedTrajectory)
    needed = "langchain-openai", "langgraph", "init_chat_model"
    langchain = optional("langchain_openai", *needed)
    client = captured.openai_client()
    given: dict[str, Any] = {
        "model": model or captured.inference_name,
        "api_key": captured.api_key,
        "temperature": 1.0,
        "max_retries": 0,
        "base_url": str(client.base_url),
        "root_async_client": client,
        "async_client": client.chat.completions,
    }
    with contextlib.suppress(ConfigError):  # no port
        given["base_url"] = captured.base_url
    return langchain.ChatOpenAI(**(given | options))
