"""The completions that are decoded together: a step feeds the last tokens and samples the next.

Prompts are computed once each. Between two steps completions may join, and those that have ended
or were cancelled leave. Weights may change between two steps too: a step computes the logits and
samples from them, so each token is of one version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gspo.kernels.kv_cache import Layout, ModelCache, SharedPrompts, places, prefill
from gspo.kernels.logprob import full_logits
from gspo.policy.policy import Policy
from gspo.serve.decoding import OpenCompletion, Running, record_expert_choices

_DEAD = {"cpu": 8, "cuda": 2}
"""Finished completions are dropped if they are 1 of 8: dropping copies the others. On a GPU the
step is captured anew too, and their share of it is small."""


class Batch:
    """Decodes completions, one token of each at a time.

    Args:
        policy: the weights, as they are at each step.
        layout: how keys and values are held. Only "shared" lets completions join.
        ends: [V] True at end tokens.
        decode: `Engine.decode`, for stop texts.
    """

    def __init__(
        self,
        policy: Policy,
        layout: Layout,
        ends: Bool[Tensor, " V"],
        decode: Callable[..., str],
    ):
        self._policy = policy
        self._layout: Layout = layout
        self._ends, self._decode = ends, decode
        self._running: Running | None = None
        self._cancelled = False

    @property
    def busy(self) -> list[OpenCompletion]:
        """The completions that run."""
        running = self._running.completions if self._running else []
        return [completion for completion in running if completion.finish is None]

    def step(self, new: Sequence[OpenCompletion]) -> bool:
        """Sample one token for each completion, `new` ones included; returns whether any runs on.

        Called with `Policy.autocast`, without gradients.
        """
        if self._running is None:
            if not new:
                return False
            self._cache, logits = self._begin(new)
            self._running = Running(new, self._ends, self._decode)
        else:
            logits = self._go_on(self._running, new)
        self._tokens = self._running.sample(logits, self._policy.version)
        self._leave_if_over()
        return self._running is not None

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
        if self._running is not None and completion in self._running.completions:
            self._running.cancel(completion)
            self._cancelled = True
            self._leave_if_over()

    def _leave_if_over(self) -> None:
        """Let go of keys and values once nothing runs."""
        if self._running is not None and not self._running.alive:
            self._running, self._cancelled = None, False
            del self._cache

    def _go_on(self, running: Running, new: Sequence[OpenCompletion]) -> Float[Tensor, "R V"]:
        """Feed the last tokens, and let `new` ones join; returns the next logits."""
        tokens, cache = self._tokens, self._cache
        dead = len(running.completions) - running.alive
        most = _DEAD.get(tokens.device.type, 8)
        if new or self._cancelled or dead * most > len(running.completions):
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
        logits = full_logits(hidden, self._policy.head)
        if new:
            joining, first = self._begin(new)
            assert isinstance(cache, SharedPrompts) and isinstance(joining, SharedPrompts)
            cache.join(joining)
            running.add(new)
            logits = torch.cat([logits, first])
        return logits

    def _begin(
        self, new: Sequence[OpenCompletion]
    ) -> tuple[SharedPrompts | ModelCache, Float[Tensor, "R V"]]:
        """Compute each distinct prompt once; returns keys, and logits of the first tokens."""
        prompts: dict[tuple[int, ...], int] = {}
        owner = [prompts.setdefault(completion.request.prompt, len(prompts)) for completion in new]
        where = places(list(prompts), self._layout)
        with record_expert_choices(self._policy, new, (where[prompt] for prompt in owner)):
            cache, hidden = prefill(
                self._policy.backbone,
                list(prompts),
                np.array(owner),
                max(completion.limit for completion in new),
                layout=self._layout,
                device=self._policy.device,
                multiple=self._policy.multiple,
            )
        logits = full_logits(hidden, self._policy.head)
        return cache, logits[torch.tensor(owner, device=logits.device)]
