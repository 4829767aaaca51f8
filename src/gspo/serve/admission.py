"""Who is decoded next: requests wait in a line, in turns, as places and memory allow.

Places: at most `max_running` completions run at once. Memory: keys and values are planned by their
real type, and may take a share of what the machine has free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gspo.kernels.kv_cache import Layout, kv_bytes
from gspo.policy.policy import Policy
from gspo.serve.decoding import OpenCompletion

KV_BYTES = 2 * 2**30
"""Most memory for keys and values on a CPU; completions beyond it wait."""
FREE_SHARE = 0.5
"""Share of the free memory that keys and values may take: training needs some too."""
TURN = 32
"""Completions that a request may start before others that wait have their turn."""
PROMPT_TOKENS = {"cpu": 512, "cuda": 8192}
"""Prompt tokens that are computed between two decode steps, one whole prompt at least."""
_PLANNED = 1024  # a completion counts as no longer than this when memory is planned
_FEW = 16  # completions that would be fewer than 1 of 16 wait for more: their prompts cost a pass


@dataclass(eq=False)
class Group:
    """The completions of one request.

    Attributes:
        completions: all of them.
        next: number of the first that waits.
        turn: how many were started since it had to let others go first.
    """

    completions: Sequence[OpenCompletion] = ()
    next: int = 0
    turn: int = 0

    @property
    def waiting(self) -> int:
        return len(self.completions) - self.next

    @property
    def done(self) -> bool:
        """Whether all have ended."""
        return all(completion.finish is not None for completion in self.completions)


class Line:
    """Completions that wait for a place: first come, first served, and in turns of `TURN`.

    Args:
        policy: the model, whose keys and values take memory.
        layout: how they are held.
        max_running: completions that run at once.
    """

    def __init__(self, policy: Policy, layout: Layout, max_running: int):
        self._device, self._shared = policy.device, layout == "shared"
        self._equal_lengths = layout == "equal_lengths"
        dtype = policy.lm.dtype if policy.compute_dtype == torch.float32 else policy.compute_dtype
        size = dtype.itemsize / torch.float32.itemsize
        self._token = kv_bytes(1, 1, policy.lm.config.get_text_config()) * size
        self._max_running = max_running
        self._groups: deque[Group] = deque()
        self._budget = 0.0

    def __bool__(self) -> bool:
        return bool(self._groups)

    def add(self, group: Group) -> None:
        self._groups.append(group)

    def drop(self, group: Group) -> None:
        """Take a request out of the line, if it is there."""
        if group in self._groups:
            self._groups.remove(group)

    def take(self, busy: Sequence[OpenCompletion]) -> list[OpenCompletion]:
        """Take the completions whose turn it is out of the line.

        Args:
            busy: those that run. If there are none, all that fit begin; otherwise prompts of
                `PROMPT_TOKENS`, so that those who run are not held up.
        """
        full = len(busy) >= self._max_running
        if not self._groups or (busy and (full or not self._shared)):
            return []
        if not busy:
            self._budget = kv_budget(self._device)
        plan = _Plan(busy, self._token, shared=self._shared)
        new: list[OpenCompletion] = []
        taken: list[Group] = []
        tokens, most = 0, PROMPT_TOKENS.get(self._device.type, PROMPT_TOKENS["cpu"])
        while self._groups:
            group = self._groups[0]
            if group.turn >= TURN and (busy or not new):
                group.turn = 0
                self._groups.rotate(-1)
                continue
            completion = group.completions[group.next]
            prompt = completion.request.prompt
            if busy and prompt not in plan.prompts:
                # A longer prompt could be cut here, once `prefill` can go on within a prompt.
                tokens += len(prompt)
                if new and tokens > most:
                    break
            plan.add(completion)
            full = plan.size > 1 and (plan.size > self._max_running or plan.bytes > self._budget)
            if full or (self._equal_lengths and new and len(prompt) != len(new[0].request.prompt)):
                break
            new.append(completion)
            taken.append(group)
            group.next += 1
            group.turn += 1
            if not group.waiting:
                self._groups.popleft()
        if full and len(new) * _FEW < len(busy):
            self._put_back(taken)
            return []
        return new

    def _put_back(self, taken: Sequence[Group]) -> None:
        for group in reversed(taken):
            if not group.waiting:
                self._groups.appendleft(group)
            group.next -= 1
            group.turn -= 1


class _Plan:
    """What completions would need in memory, at most."""

    def __init__(self, busy: Sequence[OpenCompletion], token: float, *, shared: bool):
        self._token, self._shared = token, shared
        self.prompts = {completion.request.prompt for completion in busy}
        self.size = len(busy)
        self._limit = max((min(completion.limit, _PLANNED) for completion in busy), default=0)
        self._width = max((len(prompt) for prompt in self.prompts), default=0)

    def add(self, completion: OpenCompletion) -> None:
        prompt = completion.request.prompt
        self.prompts.add(prompt)
        self.size += 1
        self._limit = max(self._limit, min(completion.limit, _PLANNED))
        self._width = max(self._width, len(prompt))

    @property
    def bytes(self) -> float:
        copies = len(self.prompts) if self._shared else self.size
        return self._token * (self.size * self._limit + copies * self._width)


def kv_budget(device: torch.device) -> float:
    """Bytes that keys and values may take now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return FREE_SHARE * (free + cached)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (available,) = (int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError):  # not Linux
        return KV_BYTES
    return min(KV_BYTES, FREE_SHARE * 1024 * available)
