"""Draw tokens from logits: inverse-CDF sampling, from random numbers that belong to a row."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 64
_LARGEST = 1.0 - 2.0**-23  # below 1 after rounding to float32 and scaling


class RowRandom:
    """Uniform numbers per row, each row from a stream of its own (counter-based Philox).

    A row's numbers depend on its key alone, so that a completion doesn't change with the batch
    that it happens to be sampled in.
    """

    def __init__(self, keys: list[tuple[int, int]], device: torch.device):
        self._streams = [
            np.random.Generator(np.random.Philox(key=_words(seed, index))) for seed, index in keys
        ]
        self._device = device
        self._block = torch.empty(0)
        self._at = _BLOCK

    def draw(self) -> Float[Tensor, " R"]:
        """One number in [0, 1) for every row."""
        if self._at == _BLOCK:
            block = np.stack([stream.random(_BLOCK) for stream in self._streams], axis=1)
            self._block = torch.from_numpy(block.clip(max=_LARGEST)).float().to(self._device)
            self._at = 0
        self._at += 1
        return self._block[self._at - 1]

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        """Go on with these rows alone."""
        self._streams = [self._streams[i] for i in rows.tolist()]
        self._block = self._block[:, rows]


def _words(*values: int) -> np.ndarray:
    return np.array([value % 2**64 for value in values], dtype=np.uint64)


def sample(
    logits: Float[Tensor, "R V"],
    temperature: Float[Tensor, " R"],
    top_p: Float[Tensor, " R"],
    uniform: Float[Tensor, " R"],
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"]]:
    """Tokens, and their float32 log-probs under softmax(logits / temperature).

    Temperature 0 takes the likeliest token, whose log-prob is at temperature 1.

    >>> logits = torch.tensor([[0.0, 0.0], [0.0, 5.0]])
    >>> one = torch.ones(2)
    >>> sample(logits, torch.tensor([1.0, 0.0]), one, torch.tensor([0.2, 0.9]))[0].tolist()
    [0, 1]
    """
    greedy = temperature == 0
    scale = torch.where(greedy, 1.0, temperature)
    logprobs = (logits.float() / scale[:, None]).log_softmax(-1)
    if bool(greedy.all()):
        tokens = logprobs.argmax(-1)
    else:
        probabilities = logprobs.exp()
        if bool((top_p < 1).any()):
            probabilities = _nucleus(probabilities, top_p)
        cumulative = probabilities.cumsum(-1)
        # Scaled by the last value: rounding leaves the sum slightly off 1.
        threshold = uniform * cumulative[:, -1]
        tokens = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(-1)
        tokens = tokens.clamp_(max=logits.shape[-1] - 1)
        if bool(greedy.any()):
            tokens = torch.where(greedy, logprobs.argmax(-1), tokens)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def _nucleus(
    probabilities: Float[Tensor, "R V"], top_p: Float[Tensor, " R"]
) -> Float[Tensor, "R V"]:
    """Zero all but the likeliest tokens that together hold `top_p`; at least one stays."""
    ordered, index = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    ordered = torch.where(before < top_p[:, None], ordered, 0.0)
    return torch.zeros_like(probabilities).scatter_(-1, index, ordered)
