"""The completions that are decoded together, and what they have sampled so far.

Tensors are of R completions. There is little Python per token: it looks at single completions only
if one may have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from gspo.policy.load import Policy
from gspo.serve.engine import FinishReason, Request, SamplingParams
from gspo.serve.sampling import RandomStreams, sample


@dataclass(eq=False)
class OpenCompletion:
    """A completion that is being made.

    Attributes:
        request: what asked for it.
        limit: most tokens.
        key: names the stream of its random numbers.
        ends: tokens that end it, beside the model's end tokens.
        finish: why it ended, or None while it waits or runs.
        text: what a stop text left of its text, if one was found.
        tokens, logprobs: once it has ended.
        versions: pairs of a policy version and the number of the first token that it sampled.
        expert_choices: for each forward pass, [n, N, K] experts of its n tokens, if asked for.
    """

    request: Request
    limit: int
    key: tuple[int, int]
    ends: frozenset[int] = frozenset()
    finish: FinishReason | Literal["cancelled"] | None = None
    text: str | None = None
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    versions: list[tuple[int, int]] = field(default_factory=list)
    expert_choices: list[np.ndarray] = field(default_factory=list)

    @cached_property
    def params(self) -> SamplingParams:
        return self.request.params

    def versions_of(self, first: int, last: int) -> tuple[int, ...]:
        """Policy versions of the tokens `first` to `last` - 1.

        >>> done = OpenCompletion(Request((1,)), 9, (0, 0), versions=[(4, 0), (5, 2)])
        >>> done.versions_of(0, 3)
        (4, 4, 5)
        """
        if len(self.versions) == 1:
            return (self.versions[0][0],) * (last - first)
        return tuple(
            next(version for version, start in reversed(self.versions) if start <= token)
            for token in range(first, last)
        )


@contextmanager
def record_expert_choices(
    policy: Policy, completions: Sequence[OpenCompletion], places: Iterable[slice]
) -> Iterator[None]:
    """Note the experts of each completion's tokens in a forward pass, if its request asks.

    Args:
        policy: whose forward pass it is.
        completions: those that take part; none if no request asks.
        places: where the tokens of each completion stand in the pass.
    """
    if not any(completion.params.expert_choices for completion in completions):
        yield
        return
    with policy.routers.watch() as choices:
        yield
    chosen = choices.preferred().cpu().numpy()
    for completion, place in zip(completions, places, strict=True):
        if completion.params.expert_choices and completion.finish is None:
            completion.expert_choices.append(chosen[place])


class Running:
    """What R completions have sampled. A finished one is carried along until `keep`.

    Args:
        completions: all of them at their first token.
        ends: [V] True at end tokens.
        decode: `Engine.decode`, for stop texts.
    """

    def __init__(
        self,
        completions: Sequence[OpenCompletion],
        ends: Bool[Tensor, " V"],
        decode: Callable[..., str],
    ):
        self.device, self._ends, self._decode = ends.device, ends, decode
        self.completions: list[OpenCompletion] = []
        self.alive = 0
        self._version = -1
        self._random = RandomStreams([], self.device)
        # What each completion has: [R] its settings and count, [R, columns] what it has sampled.
        self._state: dict[str, Tensor] = {}
        self.add(completions)

    def add(self, completions: Sequence[OpenCompletion]) -> None:
        """Add completions that begin now."""
        for completion in completions if self.completions else ():  # else `sample` does it
            completion.versions.append((self._version, 0))
        self.completions += completions
        self.alive += len(completions)
        self._random.add([completion.key for completion in completions])
        params = [completion.params for completion in completions]
        columns = self._state["tokens"].shape[1] if self._state else 0
        new = {
            "temperature": torch.tensor([p.temperature for p in params], dtype=torch.float32),
            "top_p": torch.tensor([p.top_p for p in params], dtype=torch.float32),
            "heeds": torch.tensor([not p.ignore_eos for p in params]),  # end tokens
            "limit": torch.tensor([completion.limit for completion in completions]),
            "count": torch.zeros(len(params), dtype=torch.long),
            "tokens": torch.zeros(len(params), columns, dtype=torch.int32),
            "logprobs": torch.zeros(len(params), columns),
        }
        for name, values in new.items():
            old = [self._state[name]] if name in self._state else []
            self._state[name] = torch.cat([*old, values.to(self.device)])

    def sample(self, logits: Float[Tensor, "R V"], version: int) -> Int[Tensor, " R"]:
        """Draw a token for each completion, write it down, and mark those that it ended.

        Args:
            logits: of the next tokens.
            version: of the weights that gave the logits.
        """
        state = self._state
        self._note(version)
        uniform, barred = self._random.draw(), self._barred()
        tokens, logprobs = sample(logits, state["temperature"], state["top_p"], uniform, barred)
        count = state["count"]
        longest = int(count.max())  # a device is asked once
        for name, new in (("tokens", tokens.to(torch.int32)), ("logprobs", logprobs)):
            if longest == state[name].shape[1]:
                state[name] = functional.pad(state[name], (0, max(32, state[name].shape[1])))
            state[name].scatter_(1, count[:, None], new[:, None])
        count += 1
        stopped = self._ends[tokens] & state["heeds"]
        if any(completion.ends for completion in self.completions):
            pairs = zip(tokens.tolist(), self.completions, strict=True)
            ended = [token in completion.ends for token, completion in pairs]
            stopped |= torch.tensor(ended, device=self.device)
        done = stopped | (count >= state["limit"])
        if bool(done.any()) or any(completion.params.stop for completion in self.completions):
            self._finish(stopped.tolist(), done.tolist())
        return tokens

    def _note(self, version: int) -> None:
        """Write the version down, if the last token was of another."""
        if version != self._version:
            self._version = version
            counts = self._state["count"].tolist()
            for completion, count in zip(self.completions, counts, strict=True):
                if completion.finish is None:
                    completion.versions.append((version, count))

    def sampled(
        self, completion: OpenCompletion, first: int
    ) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Tokens and log-probs of one that runs, from number `first` on; none if it waits yet."""
        if completion not in self.completions:
            return (), ()
        i = self.completions.index(completion)
        new = slice(first, int(self._state["count"][i]))
        tokens, logprobs = (self._state[name][i, new].tolist() for name in ("tokens", "logprobs"))
        return tuple(tokens), tuple(logprobs)

    def cancel(self, completion: OpenCompletion) -> None:
        """End a completion that nobody wants any more."""
        completion.finish = "cancelled"
        self.alive -= 1

    def _barred(self) -> Bool[Tensor, "R V"] | None:
        """Mark the end tokens of the completions that are shorter than their min_tokens, if any."""
        if not any(completion.params.min_tokens for completion in self.completions):
            return None
        counts = self._state["count"].tolist()
        short = [i for i, n in enumerate(counts) if n < self.completions[i].params.min_tokens]
        if not short:
            return None
        barred = self._ends.new_zeros(len(self.completions), len(self._ends))
        for i in short:
            barred[i] = self._ends & self._state["heeds"][i]
            barred[i, list(self.completions[i].ends)] = True
        return barred

    def keep(self) -> np.ndarray:
        """Drop the finished completions; returns the places of those that stay."""
        places = [i for i, completion in enumerate(self.completions) if completion.finish is None]
        index = torch.tensor(places, device=self.device, dtype=torch.long)
        self.completions = [self.completions[i] for i in places]
        self._random.keep(index)
        self._state = {name: values[index] for name, values in self._state.items()}
        return np.array(places, dtype=np.int64)

    def _finish(self, stopped: list[bool], done: list[bool]) -> None:
        for i, completion in enumerate(self.completions):
            if completion.finish is not None:
                continue
            if stopped[i]:
                completion.finish = "stop"
            elif completion.params.stop and (text := self._cut(i)) is not None:
                completion.finish, completion.text = "stop", text
            elif done[i]:
                completion.finish = "length"
            if completion.finish is not None:
                self._write(i)
                self.alive -= 1

    def _cut(self, i: int) -> str | None:
        """The text before the first stop text, or None if there is none yet."""
        params, count = self.completions[i].params, int(self._state["count"][i])
        if count < params.min_tokens:
            return None
        tokens = self._state["tokens"][i, :count].tolist()
        special = not params.skip_special_tokens
        text = self._decode(tokens, special=special)
        # A stop text counts only if it ends behind the first min_tokens.
        least = len(self._decode(tokens[: params.min_tokens], special=special))
        starts = (text.find(stop, max(0, least - len(stop) + 1)) for stop in params.stop)
        first = min((start for start in starts if start >= 0), default=None)
        return None if first is None else text[:first]

    def _write(self, i: int) -> None:
        state = self._state
        length = int(state["count"][i])
        self.completions[i].tokens = tuple(state["tokens"][i, :length].tolist())
        self.completions[i].logprobs = tuple(state["logprobs"][i, :length].tolist())
        # A finished completion is still computed until `keep` drops it; its tokens are ignored.
        # It writes them over the start of its buffer.
        state["count"][i] = 0
        state["limit"][i] = torch.iinfo(torch.long).max
