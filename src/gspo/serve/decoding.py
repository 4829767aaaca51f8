"""The completions that are decoded together, and what they have sampled so far.

Tensors are of R completions. There is little Python per token: it looks at single completions only
if one may have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

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
        tokens, logprobs, versions: once it has ended; versions are the weights' of each token.
        expert_choices: for each forward pass, [n, N, K] experts of its n tokens, if asked for.
    """

    request: Request
    limit: int
    key: tuple[int, int]
    ends: frozenset[int] = frozenset()
    finish: FinishReason | None = None
    text: str | None = None
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    versions: tuple[int, ...] = ()
    expert_choices: list[np.ndarray] = field(default_factory=list)

    @cached_property
    def params(self) -> SamplingParams:
        return self.request.params


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
        self._versions: list[int] = []  # of the weights, in each step
        self._random = RandomStreams([], self.device)
        # What each completion has: [R] its settings and count, [R, columns] what it has sampled.
        self._state: dict[str, Tensor] = {}
        self.add(completions)

    def add(self, completions: Sequence[OpenCompletion]) -> None:
        """Add completions that begin now."""
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
        uniform, barred = self._random.draw(), self._barred()
        tokens, logprobs = sample(logits, state["temperature"], state["top_p"], uniform, barred)
        count = state["count"]
        longest = int(count.max())  # a device is asked once
        self._versions.append(version)
        if len(self._versions) > 2 * longest + 1024:
            del self._versions[: -longest - 1]  # those of completions that have left
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

    def cancel(self, completion: OpenCompletion) -> None:
        """End a completion that nobody wants any more."""
        completion.finish = "length"
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

    def read(
        self, i: int, first: int = 0
    ) -> tuple[tuple[int, ...], tuple[float, ...], tuple[int, ...]]:
        """Tokens, log-probs and versions of completion i, from token `first` on."""
        count = int(self._state["count"][i])
        tokens, logprobs = (
            tuple(self._state[name][i, first:count].tolist()) for name in ("tokens", "logprobs")
        )
        # One that runs has sampled a token in each of the last steps.
        return tokens, logprobs, tuple(self._versions[len(self._versions) - count + first :])

    def _write(self, i: int) -> None:
        completion, state = self.completions[i], self._state
        completion.tokens, completion.logprobs, completion.versions = self.read(i)
        # A finished completion is still computed until `keep` drops it; its tokens are ignored.
        # It writes them over the start of its buffer.
        state["count"][i] = 0
        state["limit"][i] = torch.iinfo(torch.long).max
