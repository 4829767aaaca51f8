"""An agent of pydantic-ai, package `pydantic-ai-slim[openai]`. It knows nothing of gspo."""

from __future__ import annotations

from openai import AsyncOpenAI
from pydantic_ai import Agent, AgentRunError, UsageLimits
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

MOST_TURNS = 3


async def agent(client: AsyncOpenAI, model: str, question: str, letters: str) -> str:
    """Answer a question with the tool `look_up`, which knows the letter of each digit."""
    chat = OpenAIChatModel(model, provider=OpenAIProvider(openai_client=client))
    assistant = Agent(chat, model_settings={"max_tokens": 80})

    @assistant.tool_plain
    def look_up(key: int) -> str:
        """The letter that belongs to a digit."""
        return letters[key] if 0 <= key <= 9 else "key must be a digit"

    limits = UsageLimits(request_limit=MOST_TURNS)
    try:
        return (await assistant.run(question, usage_limits=limits)).output
    except AgentRunError:  # too many turns, or a call that makes no sense
        return ""
