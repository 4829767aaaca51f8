"""Attention while decoding: the completions of a prompt share one copy of its keys and values.

Each completion attends to its prompt's keys, which are multiplied once for all completions of that
prompt, and to the keys of the tokens that it decoded; one softmax runs over both. `kv_cache` holds
the keys.

Shapes: N completions of P prompts, H query heads in K groups of g, W positions of the prompts, C
columns that the completions have written, D wide keys, E wide values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class PromptGroup:
    """Prompts that have about the same number of completions, and share one matrix product.

    Attributes:
        prompts: these prompts, a slice of all.
        completions: [p, G] the completions of each prompt; padding repeats completion 0.
        places: places of `completions`, flattened, that are not padding. None: there is none, and
            the group holds all completions in their order.
        listed: the completion in each of these places.
    """

    prompts: slice
    completions: Int[Tensor, "p G"]
    places: Int[Tensor, " n"] | None
    listed: Int[Tensor, " n"] | None

    def gather(self, values: Float[Tensor, "N K g X"]) -> Float[Tensor, "p K Gg X"]:
        """Put the values of the group's completions under their prompts."""
        shape = self.completions.shape
        under = values[self.completions] if self.places is not None else values.unflatten(0, shape)
        return under.transpose(1, 2).flatten(2, 3)

    def scatter(
        self, target: Float[Tensor, "N K g X"], values: Float[Tensor, "p K Gg X"], *, add: bool
    ) -> None:
        """Write values that are under the prompts to their completions in `target`, or add them."""
        count = self.completions.shape[1]
        values = values.unflatten(2, (count, -1)).transpose(1, 2)  # [p, G, K, g, X]
        if self.places is None or self.listed is None:
            place = target.view(values.shape)
            place.add_(values) if add else place.copy_(values)
            return
        values = values.flatten(0, 1).index_select(0, self.places).to(target.dtype)
        put = target.index_add_ if add else target.index_copy_
        put(0, self.listed, values)


def prompt_groups(
    prompt_of: np.ndarray, sizes: np.ndarray, device: torch.device
) -> list[PromptGroup]:
    """Cut the prompts into groups in which padding at most doubles the work.

    Args:
        prompt_of: [N] prompt of each completion.
        sizes: [P] completions that each prompt had at first; a group ends before they differ by
            more than a factor of 2.
        device: that uses the indices. They are computed on the host, so nothing waits for it.
    """
    counts = np.bincount(prompt_of, minlength=len(sizes))
    order = np.argsort(prompt_of, kind="stable")
    first = np.cumsum(counts) - counts
    edges = [0]
    largest = smallest = sizes[0]
    for prompt, size in enumerate(sizes):
        largest, smallest = max(largest, size), min(smallest, size)
        if largest > 2 * smallest:
            edges.append(prompt)
            largest = smallest = size

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    groups = []
    for start, stop in zip(edges, [*edges[1:], len(sizes)], strict=True):
        width = int(counts[start:stop].max())
        if width == 0:
            continue
        place = np.arange(width)
        real = place < counts[start:stop, None]
        listed = np.minimum(first[start:stop, None] + place, len(order) - 1)
        completions = np.where(real, order[listed], 0)
        whole = real.all() and np.array_equal(completions.ravel(), np.arange(len(prompt_of)))
        groups.append(
            PromptGroup(
                slice(start, stop),
                tensor(completions),
                None if whole else tensor(np.flatnonzero(real)),
                None if whole else tensor(completions[real]),
            )
        )
    return groups


def decode_attention(
    query: Float[Tensor, "N H 1 D"],
    key: Float[Tensor, "N K C D"],
    value: Float[Tensor, "N K C E"],
    prompt_key: Float[Tensor, "P K W D"],
    prompt_value: Float[Tensor, "P K W E"],
    groups: Sequence[PromptGroup],
    hidden: Bool[Tensor, "N 1 1 L"] | None,
    scaling: float | None,
) -> Float[Tensor, "N 1 H E"]:
    """Compute the attention of one new token of each completion.

    Args:
        query: of the new tokens.
        key, value: of the tokens that each completion has decoded, the new one included.
        prompt_key, prompt_value: of the prompts, padded on the left.
        groups: which completions belong to which prompts.
        hidden: True if a completion does not see a position; L = W + C, prompts first. None: it
            sees all.
        scaling: factor of the scores; None: 1 / sqrt(D).
    """
    count, heads, _, depth = query.shape
    kv_heads, width = key.shape[1], prompt_key.shape[2]
    # Queries are scaled instead of scores, of which there are many more.
    query = query.reshape(count, kv_heads, heads // kv_heads, depth)
    query = query * (depth**-0.5 if scaling is None else scaling)
    scores = torch.empty(
        *query.shape[:3], width + key.shape[2], dtype=torch.float32, device=query.device
    )
    scores[..., width:] = query @ key.mT
    for group in groups:
        products = group.gather(query) @ prompt_key[group.prompts].mT
        group.scatter(scores[..., :width], products, add=False)
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    weights = scores.softmax(-1).to(value.dtype)
    out = weights[..., width:] @ value
    for group in groups:
        products = group.gather(weights[..., :width]) @ prompt_value[group.prompts]
        group.scatter(out, products, add=True)
    return out.reshape(count, 1, heads, -1)
