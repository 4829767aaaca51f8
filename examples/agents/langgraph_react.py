"""A ReAct agent of LangGraph: model and tools in turn. It knows nothing of gspo.

`langgraph.prebuilt.create_react_agent` makes the same graph, and is captured as well; it is
deprecated for a function of the package `langchain`, so here the graph is made of its parts. Needs
`pip install -e '.[langgraph]'`.
"""

from __future__ import annotations

from typing import Any

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.errors import GraphRecursionError
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from openai import AsyncOpenAI

MOST_STEPS = 6  # three of the model, three of its tools


async def agent(client: AsyncOpenAI, model: str, question: str, letters: str) -> str:
    """Answer a question with the tool `look_up`, which knows the letter of each digit."""

    @tool
    def look_up(key: int) -> str:
        """The letter that belongs to a digit."""
        return letters[key] if 0 <= key <= 9 else "key must be a digit"

    # ChatOpenAI(base_url=..., api_key=...) does as well; it would make a client of its own.
    key: Any = client.api_key
    chat = ChatOpenAI(
        model=model,
        max_completion_tokens=80,
        api_key=key,
        root_async_client=client,
        async_client=client.chat.completions,
    )
    asks = chat.bind_tools([look_up])

    async def ask(state: MessagesState) -> Any:
        return {"messages": [await asks.ainvoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("model", ask)
    graph.add_node("tools", ToolNode([look_up]))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition)
    graph.add_edge("tools", "model")
    asked: Any = {"messages": [("user", question)]}
    try:
        state = await graph.compile().ainvoke(asked, {"recursion_limit": MOST_STEPS})
    except GraphRecursionError:
        return ""
    return state["messages"][-1].text
