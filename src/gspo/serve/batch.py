"""The completions that are decoded together: a step feeds the last tokens and samples the next.

Prompts are computed once each; if many tokens wait, a step reads some of them, so that a long
prompt does not hold up those who run. Between two steps completions may join, and those that have
ended or were cancelled leave. Weights may change between two steps too: a step computes the logits
and samples from them, so each token is of one version.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gspo.kernels.kv_cache import Layout, Reading, SharedPrompts
from gspo.kernels.logprob import full_logits
from gspo.kernels.tile_attention import TILE
from gspo.policy.policy import Policy
from gspo.serve.admission import PROMPT_TOKENS
from gspo.serve.decoding import OpenCompletion, Running, record_expert_choices

_DEAD = {"cpu": 8, "cuda": 2}
"""Finished completions are dropped if they are 1 of 8: dropping copies the others. On a GPU the
step is captured anew too, and their share of it is small."""
_IDLE = 8
"""While nobody runs, a step reads so many times as much."""


@dataclass(eq=False)
class Joining:
    """Completions whose prompts are being read.

    Attributes:
        completions: all of them.
        owner: the prompt of each.
        version: of the weights that have read so far.
        begun: how often they were begun: anew whenever the weights change.
    """

    completions: list[OpenCompletion]
    owner: list[int]
    reading: Reading
    version: int
    begun: int = 1

    @property
    def alive(self) -> list[int]:
        """Places of the completions that were not cancelled."""
        return [i for i, completion in enumerate(self.completions) if completion.finish is None]


class Batch:
    """Decodes completions, one token of each at a time.

    Args:
        policy: the weights, as they are at each step.
        layout: how keys and values are held. Only "shared" lets completions join.
        ends: [V] True at end tokens.
        decode: `Engine.decode`, for stop texts.
    """

    def __init__(
        self, policy: Policy, layout: Layout, ends: Bool[Tensor, " V"], decode: Callable[..., str]
    ):
        self._policy = policy
        self._layout: Layout = layout
        self._ends, self._decode = ends, decode
        self._running: Running | None = None
        self._joining: deque[Joining] = deque()
        self._cancelled = False
        self._most = PROMPT_TOKENS[policy.device.type == "cuda"]

    @property
    def busy(self) -> list[OpenCompletion]:
        """The completions that run, or whose prompts are being read."""
        every = list(self._running.completions) if self._running else []
        for joining in self._joining:
            every += joining.completions
        return [completion for completion in every if completion.finish is None]

    def step(self, new: Sequence[OpenCompletion]) -> bool:
        """Sample one token for each completion whose prompt has been read, `new` ones included;
        returns whether any goes on.

        Called without gradients.
        """
        if new:
            self._joining += self._begin(new)
        read = self._read()
        logits: list[Tensor] = []
        if self._running is not None:
            logits.append(self._go_on(self._running, joined=bool(read)))
        for joining in read:
            logits.append(self._join(joining))
        if self._running is not None:
            self._tokens = self._running.sample(torch.cat(logits), self._policy.version)
            self._leave_if_over()
        return self._running is not None or bool(self._joining)

    def sampled(
        self, completion: OpenCompletion, first: int
    ) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Tokens and log-probs of a completion, from token `first` on."""
        running = self._running.completions if self._running else []
        if self._running and completion.finish is None and completion in running:
            return self._running.read(running.index(completion), first)
        return completion.tokens[first:], completion.logprobs[first:]

    def cancel(self, completion: OpenCompletion) -> None:
        """End a completion that nobody wants any more; its place is free at once."""
        completion.finish = "length"
        if self._running is not None and completion in self._running.completions:
            self._running.alive -= 1
            self._cancelled = True
            self._leave_if_over()
        for joining in list(self._joining):
            if not joining.alive:
                self._joining.remove(joining)

    def _leave_if_over(self) -> None:
        """Let go of keys and values once nothing runs."""
        if self._running is not None and not self._running.alive:
            self._running, self._cancelled = None, False
            del self._cache

    def _go_on(self, running: Running, *, joined: bool) -> Float[Tensor, "R V"]:
        """Feed the last tokens; returns the next logits. Where others join, those who have ended
        leave first."""
        tokens, cache = self._tokens, self._cache
        dead = len(running.completions) - running.alive
        most = _DEAD.get(tokens.device.type, 8)
        # A finished completion goes on too: not beyond the positions that the model has.
        full = isinstance(cache, SharedPrompts) and cache.lengths.max() >= self._policy.context
        if joined or self._cancelled or full or dead * most > len(running.completions):
            self._cancelled = False
            stay = running.keep()
            cache.keep(stay)
            tokens = tokens[torch.from_numpy(stay).to(tokens.device)]
        each = (slice(i, i + 1) for i in range(len(running.completions)))
        with record_expert_choices(self._policy, running.completions, each) as watched:
            if watched and isinstance(cache, SharedPrompts):
                hidden = cache.feed(tokens[:, None])[:, 0]  # a replay would run no router
            else:
                hidden = cache.advance(tokens)
        return full_logits(hidden, self._policy.head)

    def _begin(self, new: Sequence[OpenCompletion]) -> list[Joining]:
        """Begin to read the prompts: long ones each by itself, so that no short one is padded to
        their length or waits for them."""
        by_length: dict[tuple[int, ...], list[OpenCompletion]] = {}
        for completion in new:
            prompt = completion.request.prompt
            long = self._layout == "shared" and len(prompt) > self._most
            by_length.setdefault(prompt if long else (), []).append(completion)
        joining = []
        for completions in by_length.values():
            prompts: dict[tuple[int, ...], int] = {}
            owner = [prompts.setdefault(c.request.prompt, len(prompts)) for c in completions]
            reading = Reading(
                self._policy.backbone,
                list(prompts),
                layout=self._layout,
                device=self._policy.device,
                multiple=self._policy.multiple,
            )
            joining.append(Joining(completions, owner, reading, self._policy.version))
        return joining

    def _read(self) -> list[Joining]:
        """Read on in the prompts, in turns; returns those that have been read."""
        room = self._most * (_IDLE if self._running is None else 1)
        read = []
        while self._joining and room > 0:
            joining = self._joining.popleft()
            room -= self._read_piece(joining, room)
            at_end = joining.reading.done == joining.reading.width
            (read if at_end else self._joining).append(joining)
        return read

    def _read_piece(self, joining: Joining, room: int) -> int:
        """Read about as many tokens as there is room for; returns how many there were."""
        reading, version = joining.reading, self._policy.version
        if version != joining.version:
            # A prompt's keys are of the weights that go on from it. None of its tokens has been
            # sampled, so it may as well begin now, in pieces as before. If the weights change again
            # and again, the pieces double each time, so that it ends.
            reading.again()
            joining.version, joining.begun = version, joining.begun + 1
            for completion in joining.completions:
                completion.expert_choices.clear()
        columns, prompts = reading.width - reading.done, len(reading.prompts)
        if self._layout == "shared":
            room <<= max(0, joining.begun - 2)
            columns = min(columns, max(TILE, room // prompts // TILE * TILE))
        where = reading.places(columns)
        places = (where[prompt] for prompt in joining.owner)
        with record_expert_choices(self._policy, joining.completions, places):
            reading.read(columns)
        return columns * prompts

    def _join(self, joining: Joining) -> Float[Tensor, "R V"]:
        """Let completions run whose prompts have been read; returns their first logits."""
        alive = joining.alive
        owner = np.array([joining.owner[i] for i in alive])
        completions = [joining.completions[i] for i in alive]
        cache, hidden = joining.reading.opened(owner, max(c.limit for c in completions))
        if self._running is None:
            self._cache, self._running = cache, Running(self._ends, self._decode)
        else:
            assert isinstance(self._cache, SharedPrompts) and isinstance(cache, SharedPrompts)
            self._cache.join(cache)
        self._running.add(completions)
        logits = full_logits(hidden, self._policy.head)
        return logits[torch.from_numpy(owner).to(logits.device)]
