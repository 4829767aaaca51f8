"""Scenarios that a model invents, from a server that answers what a test says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gspo import mcp
from gspo.core.errors import ConfigError, DataError

TOOLS = [{"name": "search", "description": "finds mail"}]


class Server:
    """Takes the place of `AsyncOpenAI`, and answers with the next of `answers`."""

    def __init__(self, *answers: str):
        self.answers, self.asked = list(answers), []
        self.chat = self.completions = self

    def __call__(self, **options: Any) -> Server:
        self.options = options
        return self

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def create(self, **request: Any) -> Any:
        from types import SimpleNamespace

        self.asked.append(request)
        message = SimpleNamespace(content=self.answers.pop(0))
        return SimpleNamespace(choices=[SimpleNamespace(message=message)])


def scenarios(*tasks: str) -> str:
    return json.dumps({"scenarios": [{"task": task, "difficulty": 2} for task in tasks]})


async def test_it_asks_until_there_are_enough(monkeypatch: pytest.MonkeyPatch):
    server = Server("no JSON", scenarios("a", "b"), scenarios("b", "c", "d"))
    monkeypatch.setattr(mcp, "AsyncOpenAI", server)
    found = await mcp.generate_scenarios(
        TOOLS, num_scenarios=3, generator_model="g", generator_base_url="http://x/v1"
    )
    assert [scenario.task for scenario in found] == ["a", "b", "c"]
    assert server.options["base_url"] == "http://x/v1"
    assert "Invent 1 tasks" in server.asked[-1]["messages"][0]["content"]
    assert "finds mail" in server.asked[-1]["messages"][0]["content"]


async def test_what_cannot_be_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mcp, "AsyncOpenAI", Server(*[scenarios("a")] * 3, '{"scenarios": [{}]}'))
    with pytest.raises(
        DataError, match=r"g made 1 of 2 scenarios in 4 answers; the last answer was"
    ):
        await mcp.generate_scenarios(TOOLS, num_scenarios=2, generator_model="g")
    with pytest.raises(ConfigError, match="at least one tool"):
        await mcp.generate_scenarios([], generator_model="g")
    with pytest.raises(ConfigError, match="'show_preview' is not supported"):
        await mcp.generate_scenarios(TOOLS, generator_model="g", show_preview=False)  # pyright: ignore[reportCallIssue]
