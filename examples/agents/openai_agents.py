"""An agent of OpenAI's Agents SDK, package `openai-agents`. It knows nothing of gspo.

Its default model asks `/v1/responses`; `agent_of_chats` is the same on `/v1/chat/completions`.
"""

from __future__ import annotations

from functools import partial

from agents import (
    Agent,
    AgentsException,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    function_tool,
)
from openai import AsyncOpenAI

MOST_TURNS = 3


async def agent(
    client: AsyncOpenAI,
    model: str,
    question: str,
    letters: str,
    kind: type[OpenAIResponsesModel | OpenAIChatCompletionsModel] = OpenAIResponsesModel,
) -> str:
    """Answer a question with the tool `look_up`, which knows the letter of each digit."""

    @function_tool
    def look_up(key: int) -> str:
        """The letter that belongs to a digit."""
        return letters[key] if 0 <= key <= 9 else "key must be a digit"

    assistant = Agent(
        name="assistant",
        tools=[look_up],
        model=kind(model=model, openai_client=client),
        model_settings=ModelSettings(max_tokens=80),
    )
    # Traces would be sent to OpenAI.
    config = RunConfig(tracing_disabled=True)
    try:
        result = await Runner.run(assistant, question, max_turns=MOST_TURNS, run_config=config)
    except AgentsException:  # too many turns, or a call that makes no sense
        return ""
    return str(result.final_output)


agent_of_chats = partial(agent, kind=OpenAIChatCompletionsModel)
