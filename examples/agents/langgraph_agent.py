"""LangGraph's react agent, as it stands. It is captured by the base URL of the episode.

Needs `pip install -e '.[langgraph]'`, and a model with a port: `art.LocalBackend(port=0)`. See
docs/agents.md.
"""

from __future__ import annotations

from typing import Any

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.prebuilt import create_react_agent
from warehouse import Warehouse, warehouse

import gspo as art

MOST_STEPS = 12


async def agent(chat: ChatOpenAI, task: Warehouse) -> str:
    """Answer the question of a warehouse."""

    @tool
    def stock(thing: str) -> str:
        """How many pieces of a thing are in the warehouse."""
        return task.stock(thing)

    graph = create_react_agent(chat, [stock], prompt="End with the number that is asked for.")
    messages: Any = {"messages": [("user", task.question)]}
    state = await graph.ainvoke(messages, {"recursion_limit": MOST_STEPS})
    return state["messages"][-1].text


async def rollout(model: art.TrainableModel, index: int) -> art.Trajectory:
    """One run of the agent, and its reward."""
    task = warehouse(index)
    async with art.trajectory(model) as t:
        key: Any = t.api_key
        chat = ChatOpenAI(
            base_url=t.base_url, api_key=key, model=model.inference_name, max_retries=0
        )
        try:
            t.reward = task.score(await agent(chat, task))
        finally:
            await chat.root_async_client.close()  # each episode has a client of its own
    return t
