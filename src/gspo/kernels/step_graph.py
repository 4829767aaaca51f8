"""Decoding on a GPU: one step of all completions is captured once, and replayed token by token.

A step of a small model is a thousand kernels that take less time than their launches. A CUDA graph
launches them all at once. It computes with the memory that it was captured with: the tokens are
copied to where it reads them, and positions, places in the slabs and masks are computed in it from
counters that it counts up itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gspo.core.log import log
from gspo.kernels.hf import no_mask
from gspo.kernels.layer_input import LayerInput
from gspo.kernels.prompt_cache import SharedPrompts
from gspo.kernels.shared_contexts import Context
from gspo.kernels.tile_attention import LOG2_E, attend

COLUMNS = 128
"""A step is captured for so many more columns of the slabs than it needs, until they are full."""


class Step:
    """One token of each of N completions, by operations whose shapes stay the same.

    Args:
        cache: whose slabs, prompts and groups it uses; of those that are there now.
        columns: of the slabs that it looks at.
    """

    def __init__(self, cache: SharedPrompts, columns: int):
        self._cache, self.columns = cache, columns
        device = cache.device
        self.tokens = torch.zeros(len(cache.lengths), dtype=torch.long, device=device)
        self.positions = torch.from_numpy(cache.lengths).to(device)
        self._base = torch.from_numpy(cache.base).to(device)

    def __call__(self) -> Float[Tensor, "N D"]:
        """Feed `tokens`, and count the positions up; returns the last hidden states."""
        self._places: dict[int, Tensor] = {}
        self._masks: dict[int | None, Tensor] = {}
        hidden = self._cache.backbone(
            input_ids=self.tokens[None],
            attention_mask=no_mask(self.positions.device),
            position_ids=self.positions[None],
            use_cache=False,
            gspo_plan=self,
        ).last_hidden_state[0]
        self.positions += 1
        return hidden

    def attend(self, given: LayerInput) -> Float[Tensor, "1 N H E"]:
        """Attention of one layer."""
        query, key = given.query, given.key
        count, heads, kv_heads = query.shape[2], query.shape[1], key.shape[1]
        prompts, slabs = self._cache.layer(given.layer)
        if kv_heads not in self._places:
            first = torch.arange(count * kv_heads, device=query.device).view(count, kv_heads)
            column = (self.positions - self._base)[:, None]
            self._places[kv_heads] = (first * slabs[0].shape[2] + column).flatten()
        for slab, x in zip(slabs, (key, given.value), strict=True):
            rows = x[0].transpose(0, 1).reshape(count * kv_heads, -1).to(slab.dtype)
            slab.view(-1, slab.shape[-1]).index_copy_(0, self._places[kv_heads], rows)
        dtype = slabs[0].dtype
        q = query[0].transpose(0, 1).to(dtype) * (LOG2_E * given.scale)
        q = q.view(count, kv_heads, -1, query.shape[-1])
        context = None
        if prompts is not None:
            context = Context(prompts[0], prompts[1], self._cache.groups)
        keys, values = (slab[:, :, : self.columns] for slab in slabs)
        hidden, scoring = self._hidden(given.window), given.scoring(dtype)
        out, _ = attend(q, keys, values, context, hidden, None, scoring)
        return out.reshape(1, count, heads, -1).to(query.dtype)

    def _hidden(self, window: int | None) -> Float[Tensor, "N 1 1 1 S"]:
        """What is added to scores: what lies behind a token, outside its window, or at the end of a
        prompt that is shorter than others."""
        if window not in self._masks:
            at, base = self.positions[:, None], self._base[:, None]
            prompt = torch.arange(self._cache.width, device=at.device)[None]
            own = base + torch.arange(self.columns, device=at.device)
            hidden = torch.cat([prompt >= base, own > at], 1)
            if window is not None:
                place = torch.cat([prompt.expand(len(at), -1), own], 1)
                hidden |= place <= at - window
            zero = torch.zeros((), device=at.device)
            self._masks[window] = torch.where(hidden, -torch.inf, zero)[:, None, None, None]
        return self._masks[window]


Replay = Callable[[], Tensor]


def captured(step: Step) -> Replay:
    """Capture a step; returns what replays it. The capture itself computes nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


class GraphedPrompts(SharedPrompts):
    """`SharedPrompts` on a GPU, whose steps are replayed.

    The first step after completions came or left is computed as ever, the next one is captured.
    """

    capture: Callable[[Step], Replay] = staticmethod(captured)
    packs = False
    _step: Step | None = None
    _replay: Replay | None = None
    _warm = _refused = False

    def _group(self) -> None:
        super()._group()
        self._forget()
        self._warm = False

    def _forget(self) -> None:
        """Let go of the step, and of the memory that it computes in."""
        self._step = self._replay = None

    def feed(self, tokens: Int[Tensor, "N Q"]) -> Float[Tensor, "N Q D"]:
        self._forget()  # it would go on from where it was
        return super().feed(tokens)

    def advance(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N D"]:
        columns = int((self.lengths - self.base).max()) + 1
        if self._step is not None and (columns > self._step.columns or self._moved()):
            self._forget()
        if self._step is None and self._warm:
            self._begin(columns)
        self._warm = not self._refused
        if self._step is None or self._replay is None:
            return super().advance(tokens)
        self._step.tokens.copy_(tokens)
        self.lengths = self.lengths + 1
        return self._replay()

    def _begin(self, columns: int) -> None:
        """Capture a step of at least so many columns, if the model can be captured."""
        self.make_room(columns)
        step = Step(self, min(-(-columns // COLUMNS) * COLUMNS, self.capacity))
        try:
            self._replay = self.capture(step)
        except RuntimeError as error:
            log.info("decoding without a CUDA graph: %s", error)
            self._refused = True
            return
        self._step = step
        self._weights = [*self.backbone.parameters(), *self.backbone.buffers()]
        self._lie = [weight.data_ptr() for weight in self._weights]

    def _moved(self) -> bool:
        """Whether a weight lies elsewhere than when the step was captured."""
        now = zip(self._weights, self._lie, strict=True)
        return any(weight.data_ptr() != place for weight, place in now)
