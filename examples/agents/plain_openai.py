"""An agent for OpenAI's own client, with a tool, in a loop. `agent` knows nothing of gspo.

`rollout` is all that training adds: every call that the agent makes inside the block is recorded,
with the tokens that were sampled. See docs/agents.md.
"""

from __future__ import annotations

import json
from typing import Any

from openai import AsyncOpenAI
from warehouse import Warehouse, warehouse

import gspo as art

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "stock",
            "description": "How many pieces of a thing are in the warehouse.",
            "parameters": {
                "type": "object",
                "properties": {"thing": {"type": "string"}},
                "required": ["thing"],
            },
        },
    }
]
MOST_CALLS = 6


async def agent(client: AsyncOpenAI, model: str, task: Warehouse) -> str:
    """Answer the question of a warehouse."""
    messages: list[Any] = [
        {"role": "system", "content": "Use the tool stock. End with the number that is asked for."},
        {"role": "user", "content": task.question},
    ]
    for _ in range(MOST_CALLS):
        response = await client.chat.completions.create(
            model=model, messages=messages, tools=TOOLS, max_tokens=128
        )
        message = response.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return message.content or ""
        for call in message.tool_calls:
            result = called(task, call)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return ""


def called(task: Warehouse, call: Any) -> str:
    """What a tool call gives; the model is told of its mistakes."""
    try:
        return task.stock(str(json.loads(call.function.arguments)["thing"]))
    except (ValueError, KeyError, TypeError):
        return "the tool stock takes one argument, thing"


async def rollout(model: art.TrainableModel, index: int) -> art.Trajectory:
    """One run of the agent, and its reward."""
    task = warehouse(index)
    async with art.trajectory(model) as t:
        answer = await agent(model.openai_client(), model.inference_name, task)
        t.reward = task.score(answer)
    return t
