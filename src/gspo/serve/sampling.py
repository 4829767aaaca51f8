"""Draw tokens from logits by the inverse of the cumulative distribution.

Tensors are of R completions that are decoded together, and V tokens. What is drawn for one does not
depend on the others: there is no sum over completions, and none is touched for another's sake.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gspo.kernels.logprob import softmax_of
from gspo.kernels.running_softmax import RunningSoftmax
from gspo.serve.params import SamplingParams

_LEAVES_A_PART = frozenset({"top_k", "min_p", "top_p"})
"""The parameters that leave a part, of those that `SamplingParams.altered_by` names."""


class Parts:
    """What the K of R completions that ask for top_k, min_p or top_p sample from.

    Attributes:
        rows: [K] their places among the R.
        greedy: whether any, and whether all of the R take the likeliest token.
    """

    def __init__(self, params: Sequence[SamplingParams], device: torch.device):
        coldest = [p.temperature == 0 for p in params]
        self.greedy = any(coldest), all(coldest)
        rows = [i for i, p in enumerate(params) if not _LEAVES_A_PART.isdisjoint(p.altered_by)]
        self.rows = torch.tensor(rows, dtype=torch.long, device=device)
        chosen = [params[i] for i in rows]
        self._top_k = max((p.top_k for p in chosen), default=0)
        self._ranks = torch.tensor([p.top_k for p in chosen], dtype=torch.long, device=device)
        self._min_p = torch.tensor([p.min_p for p in chosen], device=device)
        self._some_top_p = any(p.top_p < 1 for p in chosen)
        # A sum may pass 1 before its last token: without top_p all are kept.
        top_p = [p.top_p if p.top_p < 1 else math.inf for p in chosen]
        self._top_p = torch.tensor(top_p, device=device)

    def narrow_(self, probabilities: Float[Tensor, "R V"]) -> None:
        """Set the probabilities to 0 that are outside of the part."""
        if len(self.rows):
            probabilities[self.rows] = self._narrowed(probabilities[self.rows])

    def _narrowed(self, probabilities: Float[Tensor, "K V"]) -> Float[Tensor, "K V"]:
        if self._top_k:
            most = min(self._top_k, probabilities.shape[1])
            ranks = self._ranks.clamp(max=most)
            ranked = probabilities.topk(most).values
            lowest = ranked.gather(1, (ranks - 1).clamp(min=0)[:, None]).squeeze(1)
            # As many as are like the last: which of them were meant, nobody can say.
            probabilities = torch.where(
                probabilities >= torch.where(ranks > 0, lowest, 0.0)[:, None], probabilities, 0.0
            )
        probabilities = torch.where(
            probabilities >= (self._min_p * probabilities.amax(-1))[:, None], probabilities, 0.0
        )
        if self._some_top_p:
            ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
            up_to = ordered.cumsum(-1)
            before = torch.nn.functional.pad(up_to[:, :-1], (1, 0))  # the likeliest always stays
            ordered = torch.where(before < self._top_p[:, None] * up_to[:, -1:], ordered, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter_(-1, index, ordered)
        return probabilities


def sample(
    logits: Float[Tensor, "R V"],
    temperature: Float[Tensor, " R"],
    uniform: Float[Tensor, " R"],
    parts: Parts,
    changed: tuple[Int[Tensor, " K"], Float[Tensor, "K V"]] | None = None,
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"], RunningSoftmax]:
    """Draw tokens.

    Args:
        logits: of the model.
        temperature: 0 takes the likeliest token, whose log-prob is at temperature 1.
        uniform: random numbers in [0, 1).
        parts: what each samples from.
        changed: places, and the logits that these draw from in place of `logits`.

    Returns:
        The tokens; their float32 log-probs under softmax(logits / temperature), whatever `changed`
        and `parts` are; and that softmax.

    >>> logits, cpu = torch.tensor([[0.0, 0.0], [0.0, 5.0]]), torch.device("cpu")
    >>> parts = Parts([SamplingParams(), SamplingParams(temperature=0)], cpu)
    >>> sample(logits, torch.tensor([1.0, 0.0]), torch.tensor([0.2, 0.9]), parts)[0].tolist()
    [0, 1]
    """
    greedy = temperature == 0
    scale = torch.where(greedy, 1.0, temperature)
    probabilities, softmax = softmax_of(logits, scale)
    if changed is not None:
        rows, drawn = changed
        # Relative to the likeliest that may be drawn: others may be far above it.
        probabilities[rows], _ = softmax_of(drawn, scale[rows])
    some, every = parts.greedy
    likeliest = None
    if some:
        likeliest = logits.argmax(-1)
        if changed is not None:
            likeliest[changed[0]] = changed[1].argmax(-1)
    if likeliest is not None and every:
        tokens = likeliest
    else:
        parts.narrow_(probabilities)
        cumulative = probabilities.cumsum(-1)
        # Scaled by the last value: rounding leaves the sum slightly off 1.
        threshold = uniform * cumulative[:, -1]
        tokens = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(-1)
        tokens = tokens.clamp_(max=logits.shape[-1] - 1)
        if likeliest is not None:
            tokens = torch.where(greedy, likeliest, tokens)
    return tokens, softmax.logprobs(logits.gather(-1, tokens[:, None]).squeeze(-1)), softmax
