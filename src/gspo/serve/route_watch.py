"""The experts that an MoE model routes to while it decodes, row by row, where a request asks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from gspo.policy.expert_tape import as_array
from gspo.policy.policy import Policy
from gspo.serve.decoding import Row


class RouteWatch:
    """Appends to the routes of those rows that want them; costs nothing where none does."""

    def __init__(self, policy: Policy, rows: Sequence[Row]):
        self._policy = policy
        self._on = any(row.params.routes for row in rows)

    @contextmanager
    def prefill(
        self, rows: Sequence[Row], prompt_of: Sequence[int], real: Bool[Tensor, "P W"]
    ) -> Iterator[None]:
        """Around the prompts' pass: each row gets its prompt's routes, without the padding."""
        with self._observed() as seen:
            yield
        for routes in seen:
            prompts, width = real.shape
            routes = routes.reshape(prompts, width, *routes.shape[1:])
            kept = real.cpu().numpy()
            for row, prompt in zip(rows, prompt_of, strict=True):
                if row.params.routes:
                    row.routes.append(routes[prompt][kept[prompt]])

    @contextmanager
    def decoding(self, rows: Sequence[Row]) -> Iterator[None]:
        """Around the pass of one token in each of these rows."""
        with self._observed() as seen:
            yield
        for routes in seen:
            for i, row in enumerate(rows):
                if row.params.routes and row.finish is None:
                    row.routes.append(routes[i : i + 1])

    @contextmanager
    def _observed(self) -> Iterator[list[np.ndarray]]:
        """Holds the routes of the pass inside once it is over; stays empty where none are asked."""
        seen: list[np.ndarray] = []
        if not self._on:
            yield seen
            return
        routing = self._policy.routing
        with routing.observe() as tape:
            yield seen
        seen.append(as_array(tape.own(), routing.experts))
