"""Environments without a package, for tests."""

from __future__ import annotations

import asyncio
import math
import random
import time
from typing import Any

from gspo.environments import Action, Environment, Step


class Guess(Environment):
    """Guess a number from 1 to `most`; each guess costs `cost`."""

    system_prompt = "Guess."
    max_turns = 4
    max_tokens = 2

    def __init__(self, most: int = 8, cost: float = 0.0):
        self.most, self.cost, self.closed = most, cost, 0

    def reset(self, seed: int) -> Any:
        self.number = random.Random(seed).randint(1, self.most)
        return f"1 to {self.most}?"

    def step(self, action: Action) -> Any:
        right = action.text == str(self.number)
        return Step("Yes." if right else "No.", right - self.cost, right, {"right": right})

    def instance(self, seed: int) -> Any:
        self.reset(seed)
        return str(self.number)

    def close(self) -> None:
        self.closed += 1


class Shop(Environment):
    """Answer calls of a tool, each with its own text."""

    max_turns = 2
    max_tokens = 200
    tools = [  # noqa: RUF012
        {"type": "function", "function": {"name": "price", "parameters": {"type": "object"}}}
    ]

    def reset(self, seed: int) -> str:
        self.seen: list[Action] = []
        return "Prices?"

    def step(self, action: Action) -> Step:
        self.seen.append(action)
        return Step([f"{call.arguments['of']}: 3" for call in action.calls] or "Nothing?", 0.5)


class Slow(Guess):
    """Async, and endless if told so."""

    async def reset(self, seed: int) -> str:
        await asyncio.sleep(0)
        return super().reset(seed)

    def instance(self, seed: int):
        return self.reset(seed)


class Stuck(Guess):
    """Its step never ends by itself."""

    step_timeout = 0.2
    ended = False

    def step(self, action: Action) -> Step:
        try:
            while True:
                time.sleep(0.01)
        finally:
            type(self).ended = True


class Broken(Guess):
    """Its step fails, in the way that it is told."""

    def __init__(self, way: str = "raise"):
        super().__init__()
        self.way = way

    def step(self, action: Action):
        if self.way == "raise":
            raise KeyError("lamp")
        if self.way == "exit":
            raise SystemExit(1)
        nonsense: Any = 17
        text: Any = "high"
        steps = {
            "none": None,
            "text": "text",
            "nan": Step(reward=math.nan),
            "number": Step(nonsense),
            "metric": Step(metrics={"score": text}),
        }
        return steps[self.way]
