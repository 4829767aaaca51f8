"""Attention while decoding: the rows of a prompt share one copy of its keys and values.

Each row attends to its prompt's keys, which are multiplied once for all rows of that prompt, and
to the keys of its own tokens; one softmax runs over both. Own keys lie in columns that all rows
share: a row that joins later starts at a later column.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gspo.kernels.kv_cache import CascadeCache


@dataclass(frozen=True)
class Part:
    """Prompts with about as many rows each.

    Attributes:
        prompts: these prompts, a slice of all.
        rows: [p, G] row of each place; padding repeats row 0.
        real: [p, G] False at padding.
        plain: the places are all rows in their order.
    """

    prompts: slice
    rows: Int[Tensor, "p G"]
    real: Bool[Tensor, "p G"]
    plain: bool


class Cascade:
    """Which row belongs to which prompt, and from which column on it lives.

    Args:
        owner: [R] prompt of each row.
        sizes: rows that each prompt had at first; prompts of like size stand together.
        real: [P, W] False where a prompt is padded, on the left.
    """

    def __init__(
        self, cache: CascadeCache, owner: np.ndarray, sizes: np.ndarray, real: Bool[Tensor, "P W"]
    ):
        self.cache = cache
        self.owner, self.sizes, self.real = owner, sizes, real
        self.start = np.zeros(len(owner), dtype=np.int64)
        self._rearranged()

    def _rearranged(self) -> None:
        device = self.real.device
        self.parts = _parts(self.owner, self.sizes, device)
        self.padding = None if bool(self.real.all()) else ~self.real
        self.starts = torch.from_numpy(self.start).to(device) if self.start.any() else None
        lengths = self.real.sum(-1)
        first = lengths[torch.from_numpy(self.owner).to(device)]
        self._offset = first if self.starts is None else first - self.starts

    def positions(self) -> Int[Tensor, " R"]:
        """Position in its sequence of the token that each row is about to write."""
        return self._offset + self.cache.columns

    def keep(self, rows: np.ndarray) -> None:
        """Go on with these rows alone; prompts and columns that none of them needs may go."""
        self.owner, self.start = self.owner[rows], self.start[rows]
        first = int(self.start.min(initial=self.cache.columns))
        self.start = self.start - first
        used = np.unique(self.owner)
        fewer = len(used) <= len(self.sizes) // 2
        device = self.real.device
        self.cache.keep(
            torch.from_numpy(rows).to(device),
            first,
            torch.from_numpy(used).to(device) if fewer else None,
        )
        if fewer:
            self.owner = np.searchsorted(used, self.owner)
            self.sizes, self.real = self.sizes[used], self.real[torch.from_numpy(used).to(device)]
        self._rearranged()

    def join(self, other: Cascade) -> None:
        """Add another cascade's prompts and rows; its rows start at the next column."""
        width = max(self.real.shape[1], other.real.shape[1])
        self.cache.join(other.cache, len(other.owner), width)
        self.owner = np.concatenate([self.owner, other.owner + len(self.sizes)])
        self.start = np.concatenate(
            [self.start, np.full(len(other.owner), self.cache.columns, dtype=np.int64)]
        )
        self.sizes = np.concatenate([self.sizes, other.sizes])
        self.real = torch.cat([_left_padded(self.real, width), _left_padded(other.real, width)])
        self._rearranged()

    def hidden_from_window(self, window: int) -> Bool[Tensor, "R 1 1 L"] | None:
        """Keys (prompt's, then own) that lie outside a sliding window; None: all lie inside.

        Asked inside a pass, when the new token's column is written already.
        """
        width, columns = self.real.shape[1], self.cache.columns
        if width + columns <= window:
            return None
        device = self.real.device
        own = columns - torch.from_numpy(self.start).to(device)  # tokens of each row
        prompt = own[:, None] - 1 + width - torch.arange(width, device=device)
        tail = (columns - 1 - torch.arange(columns, device=device)).expand(len(own), -1)
        return (torch.cat([prompt, tail], dim=1) >= window)[:, None, None]


def cascade_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "R H 1 D"],
    key: Float[Tensor, "R K C D"],
    value: Float[Tensor, "R K C E"],
    cascade: Cascade,
    scaling: float | None,
    window: int | None,
) -> Float[Tensor, "R 1 H E"]:
    """One new token a row against its prompt and its own keys; `key` and `value` are the own."""
    rows, heads, _, depth = query.shape
    groups, columns = key.shape[1:3]
    # Queries are scaled instead of scores, of which there are many more.
    query = query.reshape(rows, groups, heads // groups, depth)
    query = query * (depth**-0.5 if scaling is None else scaling)
    prompt_key, prompt_value = cascade.cache.prompt(module.layer_idx)  # pyright: ignore[reportArgumentType]
    width = prompt_key.shape[2]
    scores = torch.empty(
        rows, groups, heads // groups, width + columns, dtype=torch.float32, device=query.device
    )
    scores[..., width:] = query @ key.mT
    for part in cascade.parts:
        found = _by_prompt(query, part) @ prompt_key[part.prompts].mT
        if cascade.padding is not None:
            found.masked_fill_(cascade.padding[part.prompts, None, None], -torch.inf)
        _put(scores[..., :width], found, part)
    if cascade.starts is not None:
        before = torch.arange(columns, device=key.device) < cascade.starts[:, None]
        scores[..., width:].masked_fill_(before[:, None, None], -torch.inf)
    if window is not None and (hidden := cascade.hidden_from_window(window)) is not None:
        scores.masked_fill_(hidden, -torch.inf)
    weights = scores.softmax(-1).to(value.dtype)
    out = weights[..., width:] @ value
    for part in cascade.parts:
        found = _by_prompt(weights[..., :width], part) @ prompt_value[part.prompts]
        _add(out, found, part)
    return out.reshape(rows, 1, heads, -1)


def _by_prompt(x: Float[Tensor, "R K g X"], part: Part) -> Float[Tensor, "p K Gg X"]:
    """The part's rows under their prompts."""
    prompts, places = part.rows.shape
    x = x.view(prompts, places, *x.shape[1:]) if part.plain else x[part.rows]
    return x.transpose(1, 2).reshape(prompts, x.shape[2], -1, x.shape[-1])


def _by_row(x: Float[Tensor, "p K Gg X"], part: Part) -> Float[Tensor, "p G K g X"]:
    prompts, places = part.rows.shape
    return x.view(prompts, x.shape[1], places, -1, x.shape[-1]).transpose(1, 2)


def _put(target: Tensor, found: Tensor, part: Part) -> None:
    by_row = _by_row(found, part)
    if part.plain:
        target.view(*by_row.shape).copy_(by_row)
    else:
        target[part.rows[part.real]] = by_row[part.real].to(target.dtype)


def _add(target: Tensor, found: Tensor, part: Part) -> None:
    by_row = _by_row(found, part)
    if part.plain:
        target.view(*by_row.shape).add_(by_row)
    else:
        target.index_add_(0, part.rows[part.real], by_row[part.real])


def _parts(owner: np.ndarray, sizes: np.ndarray, device: torch.device) -> list[Part]:
    """Slices of the prompts in which padding all to the most rows at most doubles the work."""
    counts = np.bincount(owner, minlength=len(sizes))
    order = np.argsort(owner, kind="stable")
    first = np.cumsum(counts) - counts
    edges = [0]
    largest = smallest = sizes[0]
    for i, size in enumerate(sizes):
        largest, smallest = max(largest, size), min(smallest, size)
        if largest > 2 * smallest:
            edges.append(i)
            largest = smallest = size
    parts = []
    for a, b in zip(edges, [*edges[1:], len(sizes)], strict=True):
        places = int(counts[a:b].max())
        if places == 0:
            continue
        at = np.arange(places)
        real = at < counts[a:b, None]
        rows = np.where(real, order[np.minimum(first[a:b, None] + at, len(order) - 1)], 0)
        plain = bool(real.all()) and np.array_equal(rows.ravel(), np.arange(len(owner)))
        parts.append(
            Part(
                slice(a, b),
                torch.from_numpy(rows).to(device),
                torch.from_numpy(real).to(device),
                plain,
            )
        )
    return parts


def _left_padded(x: Tensor, width: int) -> Tensor:
    """Zeros in front of the last axis."""
    return torch.nn.functional.pad(x, (width - x.shape[-1], 0))
