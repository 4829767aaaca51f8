"""Scenarios for an agent that uses tools: `generate_scenarios` asks a model for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI
from pydantic import BaseModel, Field, ValidationError

from gspo.absent import refusing
from gspo.core.errors import ConfigError, DataError, check_whole, shown

__all__ = ["Scenario", "generate_scenarios"]

_ATTEMPTS = 4
_ASK = Path(__file__).with_name("scenarios.txt").read_text(encoding="utf-8")


class Scenario(BaseModel):
    """A task for the agent. `difficulty` is from 1 to 5."""

    task: str = Field(min_length=1)
    difficulty: int = Field(ge=1, le=5)


class _Answer(BaseModel):
    scenarios: list[Scenario]


@refusing
async def generate_scenarios(
    tools: Sequence[Any],
    resources: Sequence[Any] = (),
    num_scenarios: int = 24,
    *,
    custom_instructions: str = "",
    generator_model: str,
    generator_api_key: str | None = None,
    generator_base_url: str | None = None,
) -> list[Scenario]:
    """Ask a model for tasks that can be done with these tools.

    Args:
        tools, resources: of an MCP server, as dicts or as the objects of its client.
        num_scenarios: how many.
        custom_instructions: what else the model is told.
        generator_model, generator_api_key, generator_base_url: any OpenAI-compatible server; None:
            as the OpenAI client reads it from the environment.

    Raises:
        ConfigError: no tools and no resources, or an argument that is unknown or out of range.
        DataError: after four answers there are too few scenarios, or what was answered is none.
    """
    check_whole("num_scenarios", num_scenarios, 1)
    if not tools and not resources:
        raise ConfigError("generate_scenarios: give at least one tool or resource")
    text = {"tools": json.dumps([*map(_plain, tools)]), "more": custom_instructions}
    text["resources"] = json.dumps([*map(_plain, resources)])
    found: dict[str, Scenario] = {}
    fault = ""
    async with AsyncOpenAI(api_key=generator_api_key, base_url=generator_base_url) as client:
        for _ in range(_ATTEMPTS):
            ask = _ASK.format(count=num_scenarios - len(found), **text)
            answer = await client.chat.completions.create(
                model=generator_model,
                messages=[{"role": "user", "content": ask}],
                response_format={"type": "json_object"},
            )
            content = answer.choices[0].message.content or ""
            try:
                scenarios = _Answer.model_validate_json(content).scenarios
            except ValidationError as error:
                fault = f"; the last answer was {shown(content)}: {error.errors()[0]['msg']}"
                continue
            found |= {scenario.task: scenario for scenario in scenarios}
            if len(found) >= num_scenarios:
                return list(found.values())[:num_scenarios]
    raise DataError(
        f"{generator_model} made {len(found)} of {num_scenarios} scenarios in {_ATTEMPTS} "
        f"answers{fault}"
    )


def _plain(tool: Any) -> Any:
    """A tool or resource as JSON has it."""
    return tool.model_dump(mode="json", exclude_none=True) if isinstance(tool, BaseModel) else tool
