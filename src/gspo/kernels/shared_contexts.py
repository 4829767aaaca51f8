"""Which sequences of a call of `tile_attention` share which contexts, and products for all of them.

Shapes: as in `tile_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ContextGroup:
    """Contexts that about the same number of sequences share; one product serves them all.

    Attributes:
        contexts: these contexts, a slice of all.
        members: [p, n] the sequences of each context; padding repeats sequence 0.
        places: flat places of `members` that are no padding. None: there is none, and the group
            holds all sequences in their order.
        listed: the sequence in each of these places.
    """

    contexts: slice
    members: Int[Tensor, "p n"]
    places: Int[Tensor, " r"] | None = None
    listed: Int[Tensor, " r"] | None = None

    def gather(self, values: Float[Tensor, "N K M X"]) -> Float[Tensor, "p K nM X"]:
        """Put the values of the group's sequences under their contexts."""
        if self.places is None:
            values = values.unflatten(0, self.members.shape)
        else:
            values = values[self.members]
        return values.transpose(1, 2).flatten(2, 3)

    def scatter(self, target: Float[Tensor, "N K M X"], values: Float[Tensor, "p K nM X"]) -> None:
        """Write values that are under the contexts to their sequences in `target`."""
        values = values.to(target.dtype).unflatten(2, (self.members.shape[1], -1)).transpose(1, 2)
        if self.places is None or self.listed is None:
            target.view(values.shape).copy_(values)
            return
        target.index_copy_(0, self.listed, values.flatten(0, 1).index_select(0, self.places))


def context_groups(
    context_of: np.ndarray, sizes: np.ndarray, device: torch.device
) -> list[ContextGroup]:
    """Cut the contexts into groups in which padding at most doubles the work.

    Args:
        context_of: [N] context of each sequence.
        sizes: [P] sequences that each context had at first; a group ends before they differ by more
            than a factor of 2.
        device: that uses the indices. They are computed on the host, so nothing waits for it.
    """
    counts = np.bincount(context_of, minlength=len(sizes))
    order = np.argsort(context_of, kind="stable")
    first = np.cumsum(counts) - counts
    edges = [0]
    largest = smallest = sizes[0]
    for context, size in enumerate(sizes):
        largest, smallest = max(largest, size), min(smallest, size)
        if largest > 2 * smallest:
            edges.append(context)
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
        members = np.where(real, order[listed], 0)
        in_order = real.all() and np.array_equal(members.ravel(), np.arange(len(context_of)))
        picks = () if in_order else (np.flatnonzero(real), members[real])
        groups.append(ContextGroup(slice(start, stop), tensor(members), *map(tensor, picks)))
    return groups


@dataclass(frozen=True)
class Context:
    """Keys and values that several sequences see before those of themselves."""

    keys: Float[Tensor, "P K W D"]
    values: Float[Tensor, "P K W E"]
    groups: Sequence[ContextGroup]
