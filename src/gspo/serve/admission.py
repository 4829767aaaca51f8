"""Who is decoded next: requests wait in a line, in turns, as places and memory allow.

Places: at most `max_running` completions run at once. Memory: keys and values are planned by their
real type, and may take a share of what the machine has free.
"""

from __future__ import annotations

import math
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
PROMPT_TOKENS = (512, 8192)
"""Prompt tokens that are computed between two decode steps: on a CPU, on a GPU. Longer prompts are
read in pieces (`Batch`)."""
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


class Line:
    """Completions that wait for a place: first come, first served, and in turns of `TURN`.

    Args:
        policy: the model, whose keys and values take memory.
        layout: how they are held.
        max_running: completions that run at once.
    """

    def __init__(self, policy: Policy, layout: Layout, max_running: int):
        self._device = policy.device
        self._layout: Layout = layout
        dtype = policy.lm.dtype
        if layout == "shared" and self._device.type == "cpu":
            dtype = torch.float32  # as attention in tiles needs them
        size = dtype.itemsize / torch.float32.itemsize
        self._token = kv_bytes(1, 1, policy.lm.config.get_text_config()) * size
        self._max_running = max_running
        self._groups: deque[Group] = deque()
        self._budget = kv_budget(self._device)

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
        if not self._groups or (busy and (full or self._layout != "shared")):
            return []
        if not busy:
            self._budget = kv_budget(self._device)
        prompts = {completion.request.prompt for completion in busy}
        limit = max((min(completion.limit, _PLANNED) for completion in busy), default=0)
        width = max((len(prompt) for prompt in prompts), default=0)
        new: list[OpenCompletion] = []
        groups: list[Group] = []
        begun: dict[tuple[int, ...], int] = {}  # tokens of the prompts that are computed now
        most = PROMPT_TOKENS[self._device.type == "cuda"]
        while self._groups and not full:
            group = self._head(fair=bool(busy) or not new)
            completion = group.completions[group.next]
            prompt = completion.request.prompt
            fresh = prompt not in begun  # else it is read already, for one more completion
            begun[prompt] = len(prompt)
            long = fresh and len(busy) > 0 and sum(begun.values()) > most
            other = self._layout == "equal_lengths" and len(prompt) != width
            if new and (long or other):
                break
            prompts.add(prompt)
            limit, width = max(limit, min(completion.limit, _PLANNED)), max(width, len(prompt))
            size = len(busy) + len(new) + 1
            copies = len(prompts) if self._layout == "shared" else size
            planned = self._token * (size * limit + copies * width)
            full = size > 1 and (size > self._max_running or planned > self._budget)
            if not full:
                new.append(completion)
                groups.append(group)
                self._move(group, 1)
        if full and len(new) * _FEW < len(busy):
            for group in reversed(groups):
                self._move(group, -1)
            return []
        return new

    def _head(self, *, fair: bool) -> Group:
        """Return whose turn it is; with `fair`, who has had theirs goes to the end of the line."""
        while fair and self._groups[0].turn >= TURN:
            self._groups[0].turn = 0
            self._groups.rotate(-1)
        return self._groups[0]

    def _move(self, group: Group, step: int) -> None:
        """Take the next completion of the first group, or put the last one back."""
        if step < 0 and group.next == len(group.completions):
            self._groups.appendleft(group)
        group.next, group.turn = group.next + step, group.turn + step
        if group.next == len(group.completions):
            self._groups.popleft()


def kv_budget(device: torch.device) -> float:
    """Bytes that keys and values may take now."""
    most = math.inf if device.type == "cuda" else KV_BYTES
    free = free_memory(device)
    return KV_BYTES if free is None else min(most, FREE_SHARE * free)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had; None if the system doesn't tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (available,) = (int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError):  # not Linux
        return None
    return 1024 * available
