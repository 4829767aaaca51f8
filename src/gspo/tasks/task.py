"""What a task is: problems by split and index, and a score for an answer."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

Split = Literal["train", "heldout"]
_TRIES = 1000


def held_out(text: str) -> bool:
    """Whether a prompt is held out: a tenth of all texts is, by their hash.

    >>> [number for number in range(20) if held_out(f"prompt {number}")]
    [15, 16]
    """
    return hashlib.sha256(text.encode()).digest()[0] % 10 == 0


def conversation(system: str | None, prompt: str | None = None) -> list[dict[str, Any]]:
    """A system turn and a user turn, if there are such.

    >>> conversation("Sort.", "312")
    [{'role': 'system', 'content': 'Sort.'}, {'role': 'user', 'content': '312'}]
    """
    begin = [{"role": "system", "content": system}] if system else []
    return [*begin, *([{"role": "user", "content": prompt}] if prompt is not None else [])]


@dataclass(frozen=True)
class Problem:
    """A prompt for the user turn, the reference answer, and what the scorer needs besides.

    Attributes:
        where: of a dataset's row, which errors name.
    """

    prompt: str
    answer: str
    entry: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


class Task(ABC):
    """Problems with a verifiable reward. The splits never share a prompt.

    Your own task derives from it, and has `max_tokens` and `draw`; the rest has defaults.
    `task = "module:Class"` in a run's file names it.

        class Parity(Task):
            max_tokens = 4

            def draw(self, key):
                return Problem(str(key % 10_000), "odd" if key % 2 else "even")

            def score(self, problem, completion):
                return float(completion.strip() == problem.answer)

    Attributes:
        name: what `load_task` was given.
        max_tokens: default limit of a completion, in tokens.
        system_prompt: the system turn that goes before each prompt, or None.
        ends: whether a right answer ends by itself; else it is cut at `max_tokens`.
        tools: OpenAI's, that a right answer needs, or None.
        template_kwargs: variables of the chat template, or None.
        sizes: how many problems each split has; None: as many as are asked for.
    """

    name: str
    max_tokens: int
    system_prompt: str | None = None
    ends: ClassVar[bool] = True
    tools: ClassVar[list[dict[str, Any]] | None] = None
    template_kwargs: dict[str, Any] | None = None
    sizes: Mapping[Split, int] | None = None

    @abstractmethod
    def draw(self, key: int) -> Problem:
        """The problem of a random key: the same key gives the same problem."""

    def score(self, problem: Problem, completion: str) -> float:
        """The reward of a completion's text, usually in [0, 1]. By default 1 for the answer."""
        return float(completion == problem.answer)

    async def grade(
        self, problem: Problem, completions: Sequence[str]
    ) -> list[tuple[float, dict[str, float]]]:
        """The reward of each completion, and its parts by name: `score`, without parts."""
        return [(self.score(problem, text), {}) for text in completions]

    def problem(self, split: Split, index: int, seed: int = 0) -> Problem:
        """Problem `index` of a split: it depends on its arguments and nothing else.

        A tenth of all prompts is held out, by a hash of the prompt itself: so no prompt is in both
        splits, even if there are few different problems.

        Raises:
            RuntimeError: no problem of the split was drawn; there are too few.
        """
        for attempt in range(_TRIES):
            text = f"{split}/{seed}/{index}/{attempt}"
            problem = self.draw(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big"))
            if held_out(problem.prompt) == (split == "heldout"):
                return problem
        raise RuntimeError(f"no {split} problem in {_TRIES} draws: the task has too few problems")

    def messages(self, problem: Problem) -> list[dict[str, Any]]:
        """The conversation that asks for a completion."""
        return conversation(self.system_prompt, problem.prompt)

    def lessons(self, problem: Problem) -> list[tuple[list[dict[str, Any]], str]]:
        """What an embedded model is warm-started on: conversations, and what is said next."""
        return [(self.messages(problem), problem.answer)]
