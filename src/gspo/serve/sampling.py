"""Draw tokens from logits: inverse-CDF sampling, with a stream of random numbers per completion.

Tensors are of R completions that are decoded together, and V tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gspo.kernels.logprob import softmax_of

_BLOCK = 64
_LARGEST = 1.0 - 2.0**-23  # below 1 after rounding to float32 and scaling


class RandomStreams:
    """Uniform numbers, one stream per completion (counter-based Philox).

    A stream's numbers depend on its key only, so that a completion doesn't change with what
    happens to be decoded beside it.
    """

    def __init__(self, keys: Sequence[tuple[int, int]], device: torch.device):
        self._streams: list[np.random.Philox] = []
        self._block = torch.empty(_BLOCK, 0, device=device)
        self._next = _BLOCK
        self.add(keys)

    def add(self, keys: Sequence[tuple[int, int]]) -> None:
        """Add streams; their first numbers come with the next draw."""
        words = np.array([[word % 2**64 for word in key] for key in keys], dtype=np.uint64)
        new = [np.random.Philox(key=key) for key in words]
        self._streams += new
        block = self._block.new_zeros(_BLOCK, len(new))
        if new and self._next < _BLOCK:
            block[self._next :] = self._numbers(new, _BLOCK - self._next)
        self._block = torch.cat([self._block, block], dim=1)

    def draw(self) -> Float[Tensor, " R"]:
        """Draw the next number in [0, 1) of each stream."""
        if self._next == _BLOCK:
            self._block = self._numbers(self._streams, _BLOCK)
            self._next = 0
        self._next += 1
        return self._block[self._next - 1]

    def keep(self, index: Int[Tensor, " K"]) -> None:
        """Drop all other streams."""
        self._streams = [self._streams[i] for i in index.tolist()]
        self._block = self._block[:, index]

    def _numbers(self, streams: list[np.random.Philox], count: int) -> Float[Tensor, "C R"]:
        # From the bits, as numpy's Generator does: making one Generator per stream takes longer.
        raw = np.stack([stream.random_raw(count) for stream in streams], axis=1)
        uniform = ((raw >> np.uint64(11)) * 2.0**-53).clip(max=_LARGEST)
        return torch.from_numpy(uniform).float().to(self._block.device)


def sample(
    logits: Float[Tensor, "R V"],
    temperature: Float[Tensor, " R"],
    top_p: Float[Tensor, " R"],
    uniform: Float[Tensor, " R"],
    barred: Bool[Tensor, "R V"] | None = None,
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"]]:
    """Draw tokens; returns them and their float32 log-probs under softmax(logits / temperature).

    Temperature 0 takes the likeliest token, whose log-prob is at temperature 1. Tokens that are
    `barred` are not drawn; the log-probs are those of the full distribution all the same.

    >>> logits = torch.tensor([[0.0, 0.0], [0.0, 5.0]])
    >>> one = torch.ones(2)
    >>> sample(logits, torch.tensor([1.0, 0.0]), one, torch.tensor([0.2, 0.9]))[0].tolist()
    [0, 1]
    """
    greedy = temperature == 0
    scale = torch.where(greedy, 1.0, temperature)
    probabilities, softmax = softmax_of(logits, scale)
    drawn = logits
    if barred is not None:
        drawn = logits.masked_fill(barred, -math.inf)
        probabilities, _ = softmax_of(drawn, scale)  # relative to the likeliest that may be drawn
    if bool(greedy.all()):
        tokens = drawn.argmax(-1)
    else:
        if bool((top_p < 1).any()):
            probabilities = _nucleus(probabilities, top_p)
        cumulative = probabilities.cumsum(-1)
        # Scaled by the last value: rounding leaves the sum slightly off 1.
        threshold = uniform * cumulative[:, -1]
        tokens = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(-1)
        tokens = tokens.clamp_(max=logits.shape[-1] - 1)
        if bool(greedy.any()):
            tokens = torch.where(greedy, drawn.argmax(-1), tokens)
    return tokens, softmax.logprobs(logits.gather(-1, tokens[:, None]).squeeze(-1))


def _nucleus(
    probabilities: Float[Tensor, "R V"], top_p: Float[Tensor, " R"]
) -> Float[Tensor, "R V"]:
    """Zero all but the likeliest tokens that together hold `top_p`; at least one stays."""
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    ordered, index = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    ordered = torch.where(before < top_p[:, None], ordered, 0.0)
    return torch.zeros_like(probabilities).scatter_(-1, index, ordered)
