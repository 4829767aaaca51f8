"""What changes the logits before a token is drawn: bias, penalties, barred tokens, a grammar.

The logits of a completion are changed by operations on its own numbers only, so that it doesn't
matter what is decoded beside it. Completions without such rules cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:  # it imports this module
    from gspo.serve.decoding import OpenCompletion

_CHANGES = frozenset(
    {"repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"}
    | {"min_tokens", "grammar"}
)
"""The parameters that change logits, of those that `SamplingParams.altered_by` names."""


class LogitRules:
    """The rules of those K of R completions that have any.

    Attributes:
        rows: [K] their places among the R.

    Args:
        completions: the R that are decoded together.
        ends: [V] True at end tokens.
    """

    def __init__(self, completions: Sequence[OpenCompletion], ends: Bool[Tensor, " V"]):
        rows = [
            row
            for row, completion in enumerate(completions)
            if not _CHANGES.isdisjoint(completion.params.altered_by)
        ]
        self.rows = torch.tensor(rows, dtype=torch.long, device=ends.device)
        self._completions = [completions[row] for row in rows]
        self._ends = ends
        params = [completion.params for completion in self._completions]
        self._always = any(set(p.altered_by) & (_CHANGES - {"min_tokens"}) for p in params)
        self._bias = self._penalties = self._prompts = None
        if any(p.logit_bias for p in params):
            tokens = _padded([[token for token, _ in p.logit_bias] for p in params], torch.long)
            values = _padded([[bias for _, bias in p.logit_bias] for p in params], torch.float32)
            self._bias = tokens.to(ends.device), values.to(ends.device)
        kinds = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params]
        if any(kind != (1, 0, 0) for kind in kinds):
            self._penalties = torch.tensor(kinds, device=ends.device).T[:, :, None]
        if any(repetition != 1 for repetition, _, _ in kinds):
            prompts = [np.unique(completion.request.prompt) for completion in self._completions]
            longest = max(map(len, prompts))  # padded by tokens of their own
            prompts = [np.resize(prompt, longest) for prompt in prompts]
            self._prompts = torch.from_numpy(np.stack(prompts)).to(ends.device)

    def apply(
        self, logits: Float[Tensor, "R V"], tokens: Int[Tensor, "R C"], counts: Int[Tensor, " R"]
    ) -> Float[Tensor, "K V"] | None:
        """Return the changed logits of the K completions; None if none is to be changed.

        Args:
            logits: of all R; they stay as they are.
            tokens, counts: what each has sampled, and how many tokens that are.
        """
        if not self._completions:
            return None
        counts = counts[self.rows]
        barred = self._barred(counts)
        if not self._always and not barred:
            return None
        changed = logits[self.rows]
        if self._bias is not None:
            changed.scatter_add_(1, *self._bias)
        if self._penalties is not None:
            changed = self._penalised(changed, tokens[self.rows], counts)
        for row, mask in barred:
            changed[row].masked_fill_(mask, -math.inf)
        return changed

    def take(self, tokens: Sequence[int]) -> Iterator[int]:
        """Follow the grammars by the tokens [R] that were drawn; gives the rows that end there."""
        for row, completion in zip(self.rows.tolist(), self._completions, strict=True):
            if completion.matcher is not None and completion.finish is None:
                completion.matcher.take(tokens[row])
                if completion.matcher.finish is not None:
                    yield row

    def _penalised(
        self, logits: Float[Tensor, "K V"], tokens: Int[Tensor, "K C"], counts: Int[Tensor, " K"]
    ) -> Float[Tensor, "K V"]:
        assert self._penalties is not None
        repetition, presence, frequency = self._penalties
        written = torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]
        times = torch.zeros_like(logits, dtype=torch.int32)
        times.scatter_add_(1, tokens.long(), written.int())
        if self._prompts is not None:
            seen = (times > 0).scatter_(1, self._prompts, True)
            repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
            logits = torch.where(seen, repeated, logits)
        return logits - frequency * times - presence * (times > 0)

    def _barred(self, counts: Int[Tensor, " K"]) -> list[tuple[int, Bool[Tensor, " V"]]]:
        """The tokens that may not be drawn now, by place among the K."""
        barred = []
        some = any(completion.params.min_tokens for completion in self._completions)
        lengths = counts.tolist() if some else [0] * len(self._completions)
        for i, completion in enumerate(self._completions):
            short = lengths[i] < completion.params.min_tokens
            mask = self._ends_of(completion) if short else None
            if completion.matcher is not None and completion.finish is None:
                allowed = torch.from_numpy(completion.matcher.allowed).to(self._ends.device)
                if completion.ends and completion.matcher.accepting:
                    allowed = allowed | self._ends_of(completion)
                # Where a grammar has to end, it ends, though there are fewer than min_tokens.
                more = mask is not None and bool((allowed & ~mask).any())
                mask = ~allowed | mask if mask is not None and more else ~allowed
            if mask is not None:
                barred.append((i, mask))
        return barred

    def _ends_of(self, completion: OpenCompletion) -> Bool[Tensor, " V"]:
        """Mark the tokens that end a completion."""
        heeded = not completion.params.ignore_eos
        ends = self._ends.clone() if heeded else torch.zeros_like(self._ends)
        ends[list(completion.ends)] = True
        return ends


def _padded(lists: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    """The lists as rows of a tensor, padded by zeros."""
    rows = [torch.tensor(values, dtype=dtype) for values in lists]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
