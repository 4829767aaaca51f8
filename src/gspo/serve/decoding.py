"""The rows that run, and what they have sampled so far, without Python per token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gspo.policy.load import Policy
from gspo.serve.engine import FinishReason, SamplingParams
from gspo.serve.sampling import RowRandom, sample

_STOP: FinishReason = "stop"
_SETTINGS = ("_temperature", "_top_p", "_limit", "_heeds")


@dataclass
class Row:
    """One completion to be made.

    Attributes:
        request: position of its request.
        params: of the request.
        limit: most tokens.
        key: of its random numbers.
        finish: why it ended, or None while it runs.
        ends: tokens that end it, beside the model's end tokens.
        text: where a stop text cut it.
        tokens, logprobs: once it has ended.
        expert_choices: [n, N, K] experts of its tokens for each forward pass, if asked for.
    """

    request: int
    params: SamplingParams
    limit: int
    key: tuple[int, int]
    ends: frozenset[int] = frozenset()
    finish: FinishReason | None = None
    text: str | None = None
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    expert_choices: list[np.ndarray] = field(default_factory=list)


@contextmanager
def record_expert_choices(
    policy: Policy, rows: Sequence[Row], places: Iterable[slice]
) -> Iterator[None]:
    """Around a forward pass: note the experts of each row's tokens, if its request asks for them.

    Args:
        policy: whose forward pass it is.
        rows: those that take part; none if no request asks.
        places: where the tokens of each row stand in the pass.
    """
    if not any(row.params.expert_choices for row in rows):
        yield
        return
    with policy.routers.watch() as choices:
        yield
    chosen = choices.preferred().cpu().numpy()
    for row, place in zip(rows, places, strict=True):
        if row.params.expert_choices and row.finish is None:
            row.expert_choices.append(chosen[place])


class Running:
    """R rows that are decoded together. A finished one is carried along until `keep`.

    Args:
        rows: all of them at their first token.
        ends: [V] True at end tokens.
        decode: `Engine.decode`, for stop texts.
    """

    def __init__(self, rows: Sequence[Row], ends: Bool[Tensor, " V"], decode: Callable[..., str]):
        self.device = ends.device
        self._ends, self._decode = ends, decode
        self.rows: list[Row] = []
        self._random = RowRandom([], self.device)
        empty = torch.empty(0, device=self.device)
        self._temperature, self._top_p = empty, empty
        self._limit = self._count = empty.long()
        self._heeds = empty.bool()
        self._tokens = torch.empty(0, 0, dtype=torch.int32, device=self.device)
        self._logprobs = torch.empty(0, 0, device=self.device)
        self.alive = 0
        self.add(rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Rows that begin now, behind the others."""

        def more(old: Tensor, values: list) -> Tensor:
            return torch.cat([old, torch.tensor(values, dtype=old.dtype, device=self.device)])

        self.rows = [*self.rows, *rows]
        self._random.add([row.key for row in rows])
        self._temperature = more(self._temperature, [row.params.temperature for row in rows])
        self._top_p = more(self._top_p, [row.params.top_p for row in rows])
        self._heeds = more(self._heeds, [not row.params.ignore_eos for row in rows])
        self._limit = more(self._limit, [row.limit for row in rows])
        self._count = more(self._count, [0] * len(rows))
        self._tokens = _taller(self._tokens, len(rows))
        self._logprobs = _taller(self._logprobs, len(rows))
        self.alive += len(rows)

    def sample(self, logits: Float[Tensor, "R V"]) -> Int[Tensor, " R"]:
        """Draw a token for every row, write it down, and mark the rows that it ended."""
        tokens, logprobs = sample(
            logits, self._temperature, self._top_p, self._random.draw(), self._barred()
        )
        if int(self._count.max()) == self._tokens.shape[1]:
            self._tokens, self._logprobs = _wider(self._tokens), _wider(self._logprobs)
        at = self._count[:, None]
        self._tokens.scatter_(1, at, tokens[:, None].to(torch.int32))
        self._logprobs.scatter_(1, at, logprobs[:, None])
        self._count += 1
        stopped = self._ends[tokens] & self._heeds
        if any(row.ends for row in self.rows):
            pairs = zip(tokens.tolist(), self.rows, strict=True)
            ended = [token in row.ends for token, row in pairs]
            stopped |= torch.tensor(ended, device=self.device)
        done = stopped | (self._count >= self._limit)
        if bool(done.any()) or any(row.params.stop for row in self.rows):
            self._finish(stopped.tolist(), done.tolist())
        return tokens

    def _barred(self) -> Bool[Tensor, "R V"] | None:
        """End tokens of the rows that are shorter than their min_tokens; None without such rows."""
        counts = self._count.tolist() if any(row.params.min_tokens for row in self.rows) else []
        short = [i for i, n in enumerate(counts) if n < self.rows[i].params.min_tokens]
        if not short:
            return None
        barred = torch.zeros(len(self.rows), len(self._ends), dtype=torch.bool, device=self.device)
        for i in short:
            barred[i] = self._ends & self._heeds[i]
            barred[i, list(self.rows[i].ends)] = True
        return barred

    def keep(self) -> np.ndarray:
        """Drop the finished rows; returns the places of those that stay."""
        kept = [i for i, row in enumerate(self.rows) if row.finish is None]
        index = torch.tensor(kept, device=self.device, dtype=torch.long)
        self.rows = [self.rows[i] for i in kept]
        self._random.keep(index)
        for name in (*_SETTINGS, "_count", "_tokens", "_logprobs"):
            setattr(self, name, getattr(self, name)[index])
        return np.array(kept, dtype=np.int64)

    def _finish(self, stopped: list[bool], done: list[bool]) -> None:
        for i, row in enumerate(self.rows):
            if row.finish is not None:
                continue
            if stopped[i]:
                row.finish = _STOP
            elif row.params.stop and (text := self._cut(i)) is not None:
                row.finish, row.text = _STOP, text
            elif done[i]:
                row.finish = "length"
            if row.finish is not None:
                self._write(i)
                self.alive -= 1

    def _cut(self, i: int) -> str | None:
        """The text before the first stop text, or None where there is none yet."""
        params, count = self.rows[i].params, int(self._count[i])
        if count < params.min_tokens:
            return None
        tokens, special = self._tokens[i, :count].tolist(), not params.skip_special_tokens
        text = self._decode(tokens, special=special)
        # A stop text counts that ends behind the first min_tokens.
        least = len(self._decode(tokens[: params.min_tokens], special=special))
        starts = (text.find(stop, max(0, least - len(stop) + 1)) for stop in params.stop)
        found = [start for start in starts if start >= 0]
        return text[: min(found)] if found else None

    def _write(self, i: int) -> None:
        length = int(self._count[i])
        self.rows[i].tokens = tuple(self._tokens[i, :length].tolist())
        self.rows[i].logprobs = tuple(self._logprobs[i, :length].tolist())
        # A finished row is still computed until `keep` drops it; its tokens are ignored.
        # It writes them over the start of its buffer.
        self._count[i] = 0
        self._limit[i] = torch.iinfo(self._limit.dtype).max


def _taller(x: Tensor, rows: int) -> Tensor:
    return torch.cat([x, x.new_zeros(rows, x.shape[1])])


def _wider(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(len(x), max(32, x.shape[1]))], dim=1)
