"""Draw tokens from logits: inverse-CDF sampling, from random numbers that belong to a row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_BLOCK = 64
_LARGEST = 1.0 - 2.0**-23  # below 1 after rounding to float32 and scaling


class RowRandom:
    """Uniform numbers per row, each row from a stream of its own (counter-based Philox).

    A row's numbers depend on its key alone, so that a completion doesn't change with the batch
    that it happens to be sampled in.
    """

    def __init__(self, keys: Sequence[tuple[int, int]], device: torch.device):
        self._streams: list[np.random.Philox] = []
        self._block = torch.empty(_BLOCK, 0, device=device)
        self._at = _BLOCK
        self.add(keys)

    def add(self, keys: Sequence[tuple[int, int]]) -> None:
        """More rows, whose first number comes with the next draw."""
        new = [np.random.Philox(key=_words(seed, index)) for seed, index in keys]
        self._streams += new
        block = self._block.new_zeros(_BLOCK, len(new))
        if new and self._at < _BLOCK:
            block[self._at :] = self._numbers(new, _BLOCK - self._at)
        self._block = torch.cat([self._block, block], dim=1)

    def draw(self) -> Float[Tensor, " R"]:
        """One number in [0, 1) for every row."""
        if self._at == _BLOCK:
            self._block = self._numbers(self._streams, _BLOCK)
            self._at = 0
        self._at += 1
        return self._block[self._at - 1]

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        """Go on with these rows alone."""
        self._streams = [self._streams[i] for i in rows.tolist()]
        self._block = self._block[:, rows]

    def _numbers(self, streams: list[np.random.Philox], count: int) -> Float[Tensor, "C R"]:
        # Straight from the bits, as numpy's Generator does: making one a row takes longer.
        raw = np.stack([stream.random_raw(count) for stream in streams], axis=1)
        uniform = ((raw >> np.uint64(11)) * 2.0**-53).clip(max=_LARGEST)
        return torch.from_numpy(uniform).float().to(self._block.device)


def _words(*values: int) -> np.ndarray:
    return np.array([value % 2**64 for value in values], dtype=np.uint64)


def sample(
    logits: Float[Tensor, "R V"],
    temperature: Float[Tensor, " R"],
    top_p: Float[Tensor, " R"],
    uniform: Float[Tensor, " R"],
    barred: Bool[Tensor, "R V"] | None = None,
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"]]:
    """Tokens, and their float32 log-probs under softmax(logits / temperature).

    Temperature 0 takes the likeliest token, whose log-prob is at temperature 1. Tokens that are
    `barred` are not drawn; the log-probs are those of the full distribution all the same.

    >>> logits = torch.tensor([[0.0, 0.0], [0.0, 5.0]])
    >>> one = torch.ones(2)
    >>> sample(logits, torch.tensor([1.0, 0.0]), one, torch.tensor([0.2, 0.9]))[0].tolist()
    [0, 1]
    """
    greedy = temperature == 0
    scale = torch.where(greedy, 1.0, temperature)
    logprobs = (logits.float() / scale[:, None]).log_softmax(-1)
    drawn = logprobs
    if barred is not None:
        drawn = logprobs.masked_fill(barred, -math.inf).log_softmax(-1)
    if bool(greedy.all()):
        tokens = drawn.argmax(-1)
    else:
        probabilities = drawn.exp()
        if bool((top_p < 1).any()):
            probabilities = _nucleus(probabilities, top_p)
        cumulative = probabilities.cumsum(-1)
        # Scaled by the last value: rounding leaves the sum slightly off 1.
        threshold = uniform * cumulative[:, -1]
        tokens = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(-1)
        tokens = tokens.clamp_(max=logits.shape[-1] - 1)
        if bool(greedy.any()):
            tokens = torch.where(greedy, drawn.argmax(-1), tokens)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def _nucleus(
    probabilities: Float[Tensor, "R V"], top_p: Float[Tensor, " R"]
) -> Float[Tensor, "R V"]:
    """Zero all but the likeliest tokens that together hold `top_p`; at least one stays."""
    ordered, index = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    ordered = torch.where(before < top_p[:, None], ordered, 0.0)
    return torch.zeros_like(probabilities).scatter_(-1, index, ordered)
