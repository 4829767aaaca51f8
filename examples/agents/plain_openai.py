"""An agent for OpenAI's own client, with a tool, in a loop. It knows nothing of gspo."""

from __future__ import annotations

import json
from typing import Any

from openai import AsyncOpenAI

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "The letter that belongs to a digit.",
            "parameters": {
                "type": "object",
                "properties": {"key": {"type": "integer"}},
                "required": ["key"],
            },
        },
    }
]
MOST_TURNS = 3


async def agent(client: AsyncOpenAI, model: str, question: str, letters: str) -> str:
    """Answer a question with the tool `look_up`, which knows the letter of each digit."""

    def result(arguments: str) -> str:
        try:
            return letters[int(json.loads(arguments)["key"])]
        except (ValueError, KeyError, TypeError, IndexError):
            return "key must be a digit"

    messages: list[Any] = [{"role": "user", "content": question}]
    for _ in range(MOST_TURNS):
        response = await client.chat.completions.create(
            model=model, messages=messages, tools=TOOLS, max_tokens=80
        )
        message = response.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return message.content or ""
        for call in message.tool_calls:
            if call.type == "function":
                content = result(call.function.arguments)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
    return ""
