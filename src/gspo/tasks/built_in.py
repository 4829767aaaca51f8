"""The built-in tasks: small enough for the embedded model, hard enough to need learning.

`chain` sets the length of an answer, `climb` leaves it free; in the others the problem sets it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from itertools import takewhile
from typing import Any, ClassVar

from gspo.core.errors import check_whole
from gspo.tasks.task import Problem, Task

LONGEST = 400
"""Tokens of an answer that fit the embedded models' context."""


class Sort(Task):
    """Sort 12 digits.

    >>> Sort().draw(1).prompt, Sort().draw(1).answer
    ('291417776317', '111234677779')
    """

    max_tokens = 16

    def draw(self, key: int) -> Problem:
        rng = random.Random(key)
        prompt = "".join(rng.choice("0123456789") for _ in range(12))
        return Problem(prompt, "".join(sorted(prompt)))


class Reverse(Task):
    """Reverse 12 letters."""

    max_tokens = 16

    def draw(self, key: int) -> Problem:
        rng = random.Random(key)
        prompt = "".join(rng.choice("abcdefghij") for _ in range(12))
        return Problem(prompt, prompt[::-1])


class Add(Task):
    """Add two numbers of 6 digits on a scratchpad, column by column from the right.

    A column is `a+b+carry=sum`; the result follows `;`. The reward looks at the result only.

    >>> Add.scratchpad(47, 38, width=2)
    '7+8+0=15,4+3+1=08;85'
    """

    max_tokens = 80
    width = 6

    def draw(self, key: int) -> Problem:
        rng = random.Random(key)
        a, b = (rng.randrange(10 ** (self.width - 1), 10**self.width) for _ in range(2))
        return Problem(f"{a}+{b}", self.scratchpad(a, b, self.width))

    @staticmethod
    def scratchpad(a: int, b: int, width: int) -> str:
        """The worked solution."""
        carry, columns = 0, []
        for column in range(width):
            left, right = a // 10**column % 10, b // 10**column % 10
            total = left + right + carry
            columns.append(f"{left}+{right}+{carry}={total:02d}")
            carry = total // 10
        return f"{','.join(columns)};{a + b}"

    def score(self, problem: Problem, completion: str) -> float:
        return float(completion.rpartition(";")[2] == problem.answer.rpartition(";")[2])


class Chain(Task):
    """Continue six digits by `length` more: each is the digit six before it plus 1; 0 follows 9.

    The answer doesn't end by itself: it is cut at `length` tokens. The reward is the share of it
    that is right before the first mistake, since each mistake leads to others.

    >>> Chain(length=4).draw(1).prompt, Chain(length=4).draw(1).answer
    ('291417', '3025')
    """

    ends = False

    def __init__(self, length: int = 100):
        check_whole("task_options.length", length, 1, LONGEST)
        self.length = self.max_tokens = length

    def draw(self, key: int) -> Problem:
        rng = random.Random(key)
        digits = [rng.randrange(10) for _ in range(6)]
        for _ in range(self.length):
            digits.append((digits[-6] + 1) % 10)
        text = "".join(map(str, digits))
        return Problem(text[:6], text[6:])

    def score(self, problem: Problem, completion: str) -> float:
        pairs = zip(completion, problem.answer, strict=False)
        right = len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])
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

    max_tokens = 160

    def draw(self, key: int) -> Problem:
        rng = random.Random(key)
        start = rng.randrange(10, 99) * 100 + rng.randint(50, 80)
        top, pace = start - start % 100 + 100, rng.choice((3, 5, 9))
        way, number = [], start
        while number < top:
            number = min(top, number + rng.randint(1, pace))
            way.append(str(number))
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


class Lookup(Task):
    """Call a tool with the largest of four digits, and say the letter that it returns.

    The letter is known to the tool only, so a right answer needs a right call. In `gspo train` it
    needs a `rollout` that makes the calls: docs/tools.md has one.

    >>> task, problem = Lookup(), Lookup().draw(1)
    >>> problem.prompt, task.look_up(problem, 9), problem.answer
    ('2914', 'i', 'i')
    """

    max_tokens = 80
    tools: ClassVar[list[dict[str, Any]] | None] = [
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

    def draw(self, key: int) -> Problem:
        rng = random.Random(key)
        prompt = "".join(rng.choice("0123456789") for _ in range(4))
        return Problem(prompt, self.look_up(Problem(prompt, ""), max(map(int, prompt))))

    def look_up(self, problem: Problem, key: object) -> str:
        """What the tool returns for a problem: a letter a to j for a digit, else a complaint."""
        if not isinstance(key, int) or not 0 <= key <= 9:
            return "key must be a digit"
        return random.Random(f"{problem.prompt}/{key}").choice("abcdefghij")

    def lessons(self, problem: Problem) -> list[tuple[list[dict[str, Any]], str]]:
        asked, arguments = self.messages(problem), {"key": max(map(int, problem.prompt))}
        call = {"name": "look_up", "arguments": arguments}
        called = {"role": "assistant", "content": "", "tool_calls": [{"function": call}]}
        answered = [*asked, called, {"role": "tool", "content": problem.answer}]
        text = f"<tool_call>{json.dumps(call)}</tool_call>"
        return [(asked, text), (answered, problem.answer)]


BUILT_IN: Mapping[str, type[Task]] = {
    kind.__name__.lower(): kind for kind in (Add, Chain, Climb, Lookup, Reverse, Sort)
}
"""Name -> class. A new built-in task is a class in this file, and stands here."""
