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

from gspo.kernels.running_softmax import RunningSoftmax
from gspo.policy.load import Policy
from gspo.serve.engine import FinishReason, Request, SamplingParams, TopLogprobs
from gspo.serve.grammar import Matcher
from gspo.serve.logit_rules import LogitRules
from gspo.serve.philox import RandomStreams
from gspo.serve.sampling import Parts, sample


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
        matcher: how far it has come in its grammar, if it has one.
        top_logprobs: of each token so far, if asked for.
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
    matcher: Matcher | None = None
    top_logprobs: list[TopLogprobs] = field(default_factory=list)

    @cached_property
    def params(self) -> SamplingParams:
        return self.request.params


@contextmanager
def record_expert_choices(
    policy: Policy, completions: Sequence[OpenCompletion], places: Iterable[slice]
) -> Iterator[bool]:
    """Note the experts of each completion's tokens in a forward pass, if its request asks; says
    whether one does.

    Args:
        policy: whose forward pass it is.
        completions: those that take part; none if no request asks.
        places: where the tokens of each completion stand in the pass.
    """
    if not any(completion.params.expert_choices for completion in completions):
        yield False
        return
    with policy.routers.watch() as choices:
        yield True
    chosen = choices.preferred().cpu().numpy()
    for completion, place in zip(completions, places, strict=True):
        if completion.params.expert_choices and completion.finish is None:
            completion.expert_choices.append(chosen[place])


class Running:
    """What R completions have sampled. A finished one is carried along until `keep`.

    Args:
        ends: [V] True at end tokens.
        decode: `Engine.decode`, for stop texts.
    """

    def __init__(self, ends: Bool[Tensor, " V"], decode: Callable[..., str]):
        self.device, self._ends, self._decode = ends.device, ends, decode
        self.completions: list[OpenCompletion] = []
        self.alive = 0
        self._versions: list[int] = []  # of the weights, in each step
        self._random = RandomStreams(self.device)
        # What each completion has: [R] its settings and count, [R, columns] what it has sampled.
        self._state: dict[str, Tensor] = {}
        self._counts = np.empty(0, dtype=np.int64)  # as in the state, so that no device is asked

    def add(self, completions: Sequence[OpenCompletion]) -> None:
        """Add completions that begin now."""
        self.completions += completions
        self.alive += len(completions)
        self._random.add([completion.key for completion in completions])
        params = [completion.params for completion in completions]
        columns = self._state["tokens"].shape[1] if self._state else 0
        new = {
            "temperature": torch.tensor([p.temperature for p in params], dtype=torch.float32),
            "heeds": torch.tensor([not p.ignore_eos for p in params]),  # end tokens
            "limit": torch.tensor([completion.limit for completion in completions]),
            "count": torch.zeros(len(params), dtype=torch.long),
            "tokens": torch.zeros(len(params), columns, dtype=torch.int32),
            "logprobs": torch.zeros(len(params), columns),
        }
        for name, values in new.items():
            old = [self._state[name]] if name in self._state else []
            self._state[name] = torch.cat([*old, values.to(self.device)])
        self._counts = np.pad(self._counts, (0, len(params)))
        self._look()

    def _look(self) -> None:
        """Look at what the completions ask for, so that a step need not."""
        params = [completion.params for completion in self.completions]
        self._rules = LogitRules(self.completions, self._ends)
        self._parts = Parts(params, self.device)
        self._some_stop = any(p.stop for p in params)
        self._some_ends = any(completion.ends for completion in self.completions)
        self._some_grammar = any(completion.matcher for completion in self.completions)
        self._top = [i for i, p in enumerate(params) if p.top_logprobs]

    def sample(self, logits: Float[Tensor, "R V"], version: int) -> Int[Tensor, " R"]:
        """Draw a token for each completion, write it down, and mark those that it ended.

        Args:
            logits: of the next tokens.
            version: of the weights that gave the logits.
        """
        state = self._state
        count = state["count"]
        changed = self._rules.apply(logits, state["tokens"], count)
        tokens, logprobs, softmax = sample(
            logits,
            state["temperature"],
            self._random.draw(),
            self._parts,
            None if changed is None else (self._rules.rows, changed),
        )
        if self._top:
            self._note_top(logits, softmax)
        longest = int(self._counts.max())
        self._versions.append(version)
        if len(self._versions) > 2 * longest + 1024:
            del self._versions[: -longest - 1]  # those of completions that have left
        for name, new in (("tokens", tokens.to(torch.int32)), ("logprobs", logprobs)):
            if longest == state[name].shape[1]:
                state[name] = functional.pad(state[name], (0, max(32, state[name].shape[1])))
            state[name].scatter_(1, count[:, None], new[:, None])
        count += 1
        self._counts += 1
        stopped = self._ends[tokens] & state["heeds"]
        if self._some_ends:
            pairs = zip(tokens.tolist(), self.completions, strict=True)
            ended = [token in completion.ends for token, completion in pairs]
            stopped |= torch.tensor(ended, device=self.device)
        done = stopped | (count >= state["limit"])
        if self._some_grammar:
            done[list(self._rules.take(tokens.tolist()))] = True
        flags = torch.stack([stopped, done]).tolist()  # a device is asked once
        if self._some_stop or any(flags[1]):
            self._finish(*flags)
        return tokens

    def _note_top(self, logits: Float[Tensor, "R V"], softmax: RunningSoftmax) -> None:
        """Write down the likeliest tokens of the completions that ask for them."""
        rows = torch.tensor(self._top, device=self.device)
        most = max(self.completions[row].params.top_logprobs for row in self._top)
        values, tokens = logits[rows].topk(min(most, logits.shape[1]))
        logprobs = softmax.logprobs(values, rows).tolist()
        for row, ids, numbers in zip(self._top, tokens.tolist(), logprobs, strict=True):
            completion = self.completions[row]
            if completion.finish is None:
                pairs = tuple(zip(ids, numbers, strict=True))
                completion.top_logprobs.append(pairs[: completion.params.top_logprobs])

    def keep(self) -> np.ndarray:
        """Drop the finished completions; returns the places of those that stay."""
        places = [i for i, completion in enumerate(self.completions) if completion.finish is None]
        index = torch.tensor(places, device=self.device, dtype=torch.long)
        self.completions = [self.completions[i] for i in places]
        self._random.keep(index)
        self._state = {name: values[index] for name, values in self._state.items()}
        self._counts = self._counts[places]
        self._look()
        return np.array(places, dtype=np.int64)

    def _finish(self, stopped: list[bool], done: list[bool]) -> None:
        ended, counts = [], self._counts.tolist()
        for i, completion in enumerate(self.completions):
            if completion.finish is not None:
                continue
            if stopped[i]:
                completion.finish = "stop"
            elif completion.params.stop and (text := self._cut(i, counts[i])) is not None:
                completion.finish, completion.text = "stop", text
            elif done[i]:
                said = completion.matcher and completion.matcher.finish
                completion.finish = said or "length"
            if completion.finish is not None:
                ended.append(i)
        if ended:
            self._write(ended, [counts[i] for i in ended])

    def _cut(self, i: int, count: int) -> str | None:
        """The text before the first stop text, or None if there is none yet."""
        params = self.completions[i].params
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

    def read(self, i: int, first: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Tokens and log-probs of completion i, from token `first` on."""
        new = slice(first, int(self._counts[i]))
        tokens, logprobs = (self._state[name][i, new] for name in ("tokens", "logprobs"))
        return tuple(tokens.tolist()), tuple(logprobs.tolist())

    def _write(self, rows: list[int], counts: list[int]) -> None:
        """Write into the completions what they have sampled; all at once, as reading is slow."""
        state, index = self._state, torch.tensor(rows, device=self.device)
        names, longest = ("tokens", "logprobs"), max(counts)
        # As numbers of one kind: a device is asked once.
        both = torch.stack([state[name][index, :longest].view(torch.int32) for name in names]).cpu()
        together = both[0].tolist(), both[1].view(torch.float32).tolist()
        for i, count, tokens, logprobs in zip(rows, counts, *together, strict=True):
            completion = self.completions[i]
            completion.tokens, completion.logprobs = tuple(tokens[:count]), tuple(logprobs[:count])
            # It has sampled a token in each of the last steps.
            completion.versions = tuple(self._versions[len(self._versions) - count :])
        self.alive -= len(rows)
        # A finished completion is still computed until `keep` drops it; its tokens are ignored.
        # It writes them over the start of its buffer.
        state["count"][index] = 0
        self._counts[rows] = 0
        state["limit"][index] = torch.iinfo(torch.long).max
