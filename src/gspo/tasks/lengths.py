"""Tasks about the length of an answer: `chain` sets it, `climb` leaves it free."""

from __future__ import annotations

import random
from collections.abc import Mapping

from gspo.core.errors import ConfigError
from gspo.tasks.task import Problem, Task

LONGEST = 400
"""Tokens of an answer that fit the embedded models' context."""


class Chain(Task):
    """Continue six digits by `length` more, each one above the digit six before it; 0 follows 9.

    The answer has no end of its own: it is cut at `length` tokens. The reward is the share of it
    that is right before the first mistake, since a mistake is carried on.

    >>> Chain(length=4).draw(1).prompt, Chain(length=4).draw(1).answer
    ('291417', '3025')
    """

    name = "chain"
    ends = False
    options = ("length",)

    def __init__(self, length: int = 100):
        if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= LONGEST:
            raise ConfigError(
                f"task 'chain': length = {length!r} must be an integer from 1 to {LONGEST}"
            )
        self.length = self.max_tokens = length

    def draw(self, key: int) -> Problem:
        rng = random.Random(key)
        digits = [rng.randrange(10) for _ in range(6)]
        for _ in range(self.length):
            digits.append((digits[-6] + 1) % 10)
        text = "".join(map(str, digits))
        return Problem(text[:6], text[6:])

    def score(self, problem: Problem, completion: str) -> float:
        right = 0
        for written, wanted in zip(completion, problem.answer, strict=False):
            if written != wanted:
                break
            right += 1
        return right / self.length if len(completion) <= self.length else 0.0


class Climb(Task):
    """Count up to the next hundred in steps of 1 to 9; any such way is right.

    So right answers to one prompt differ in length. The warm start sees hurried ways and slow ones,
    of steps up to 9, 5 or 3: 35 to 90 tokens.

    >>> Climb().draw(0).prompt, Climb().draw(0).answer
    ('5974', '5975,5978,5983,5987,5991,5994,5998,6000')
    >>> [Climb().score(Problem("1393", ""), way) for way in ("1399,1400", "1400", "1403", "1399")]
    [1.0, 1.0, 0.0, 0.0]
    """

    name = "climb"
    max_tokens = 160

    def draw(self, key: int) -> Problem:
        rng = random.Random(key)
        start = rng.randrange(10, 99) * 100 + rng.randint(50, 80)
        top, pace = start - start % 100 + 100, rng.choice((3, 5, 9))
        way, at = [], start
        while at < top:
            at = min(top, at + rng.randint(1, pace))
            way.append(str(at))
        return Problem(str(start), ",".join(way))

    def score(self, problem: Problem, completion: str) -> float:
        before = int(problem.prompt)
        top = before - before % 100 + 100
        for text in completion.split(","):
            if not (len(text) == 4 and text.isascii() and text.isdigit()):
                return 0.0
            if not 1 <= int(text) - before <= 9:
                return 0.0
            before = int(text)
        return float(before == top)


LENGTH_TASKS: Mapping[str, type[Task]] = {task.name: task for task in (Chain, Climb)}
