"""The task of the agents in this folder: how many pieces of two things are in a warehouse?

The numbers are known to one tool only, `stock`, so the agent has to call it and to add.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

THINGS = ("apples", "bolts", "chairs", "drums", "eggs", "forks")


@dataclass(frozen=True)
class Warehouse:
    """Two things that are asked for, and how many pieces of each thing there are."""

    asked: tuple[str, str]
    pieces: dict[str, int]

    @property
    def question(self) -> str:
        return f"How many {self.asked[0]} and {self.asked[1]} are there together?"

    def stock(self, thing: str) -> str:
        """What the tool answers."""
        return str(self.pieces[thing]) if thing in self.pieces else f"there are no {thing} here"

    def score(self, answer: str) -> float:
        """1 if the last number of the answer is the right one."""
        numbers = re.findall(r"\d+", answer)
        return float(numbers[-1:] == [str(sum(self.pieces[thing] for thing in self.asked))])


def warehouse(index: int, seed: int = 0) -> Warehouse:
    """The warehouse of this number."""
    rng = random.Random(f"{seed}/{index}")
    first, second = rng.sample(THINGS, 2)
    return Warehouse((first, second), {thing: rng.randrange(10) for thing in THINGS})
