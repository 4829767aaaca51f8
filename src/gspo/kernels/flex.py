"""A microbatch on a GPU: one call of flex_attention, whose kernel skips what no token sees.

As in `shared_prompt_attention`, `q` sees `k` if k <= q < until[k] and
`k` is not older than the layer's window. A BlockMask says it for blocks of 128 x 128 tokens; inside
those that are seen in part, the kernel asks the mask_mod. No T x T mask is made.

    until = [3, 3, 3, 5, 5] of two samples, of 3 and of 2 tokens:  1 . . . .
                                                                   1 1 . . .
                                                                   1 1 1 . .
                                                                   . . . 1 .
                                                                   . . . 1 1

The kernel is compiled once: it takes the lengths of a microbatch as variables, and who sees whom
as tensors whose shape does not depend on the window. On the CPU flex_attention has no backward pass
and runs uncompiled, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from gspo.kernels.layer_input import LayerInput
from gspo.kernels.shared_prompt_attention import SharedPromptAttention

BLOCK = 128
_FEWEST = 2  # blocks in a microbatch: torch.compile takes a size of 1 for a constant
_KERNELS = 64  # a process may compile so many: per shape of heads, precision and need of grad


class FlexAttention:
    """Attention of one microbatch, for one forward pass, used by all of its layers.

    Attributes:
        padded: P, its tokens padded to whole blocks.
        until: [P] the first token after `k` that doesn't see it.
        positions: [P] position of each token in its samples.
    """

    def __init__(self, sight: SharedPromptAttention):
        self.size = sight.size
        self.padded = max(-(-sight.size // BLOCK), _FEWEST) * BLOCK
        extra = self.padded - sight.size
        # A token of the padding sees itself: no softmax over nothing.
        padding = torch.arange(sight.size + 1, self.padded + 1)
        until = torch.cat([torch.from_numpy(sight.until), padding])
        positions = functional.pad(torch.from_numpy(sight.positions), (0, extra))
        self.until, self.positions = (
            x.int().to(sight.device, non_blocking=True) for x in (until, positions)
        )
        self._by_window: dict[int | None, BlockMask] = {}

    def oldest(self, window: int | None) -> Int[Tensor, " P"]:
        """Return the last position that each token does not see, in layers with this window."""
        return self.positions - (self.padded if window is None else window)

    def mask_mod(self, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Make the function by which flex_attention asks whether `q` sees `k`."""
        until, positions, oldest = self.until, self.positions, self.oldest(window)

        @no_type_check
        def sees(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (q < until[k]) & (positions[k] > oldest[q])

        return sees

    def blocks(self, window: int | None) -> tuple[Bool[Tensor, "N N"], Bool[Tensor, "N N"]]:
        """Find the blocks of queries x keys that may be seen in part, and those that are seen as
        a whole. It looks at each key's span of queries, so that it costs only T x T / 128."""
        token = torch.arange(self.padded, device=self.until.device)
        start = token[::BLOCK, None]  # of each block of queries
        end = start + BLOCK
        oldest = self.oldest(window).view(-1, BLOCK, 1)
        by_some = (token < end) & (self.until > start) & (self.positions > oldest.amin(1))
        by_all = (token <= start) & (self.until >= end) & (self.positions > oldest.amax(1))
        whole = by_all.unflatten(1, (-1, BLOCK)).all(-1)
        return by_some.unflatten(1, (-1, BLOCK)).any(-1) & ~whole, whole

    def within(self, window: int | None) -> BlockMask:
        """Make the kernel's mask for layers whose tokens see the last `window` positions."""
        if window not in self._by_window:
            some, whole = self.blocks(window)
            self._by_window[window] = BlockMask.from_kv_blocks(
                *_listed(some),
                *_listed(whole),
                BLOCK_SIZE=BLOCK,
                mask_mod=self.mask_mod(window),
                seq_lengths=(self.padded, self.padded),
            )
        return self._by_window[window]

    def attend(self, given: LayerInput) -> Float[Tensor, "1 T H E"]:
        """Attention of the whole microbatch in one layer."""
        q, k, v = (x.to(given.value.dtype) for x in (given.query, given.key, given.value))
        if missing := self.padded - self.size:  # by 0 it would be a copy
            q, k, v = (functional.pad(x, (0, 0, 0, missing)) for x in (q, k, v))

        kernel = _attend if q.device.type == "cpu" else _compiled()
        out = kernel(q, k, v, self.within(given.window), repr(given.scale))
        return out[:, :, : self.size].transpose(1, 2)


def _listed(blocks: Bool[Tensor, "N N"]) -> tuple[Int[Tensor, "1 1 N"], Int[Tensor, "1 1 N N"]]:
    """Count the blocks of keys that each block of queries sees, and list them, these first."""
    order = blocks.byte().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1).int()[None, None], order.int()[None, None]


@no_type_check  # it is traced, as `sees` is, so the type checks of the tests must stay out
def _attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: str) -> Tensor:
    """Attend. `scale` is text: torch.compile makes a variable of a number that changes, and the
    kernel needs a constant."""
    gqa = q.shape[1] != k.shape[1]
    return flex_attention(q, k, v, block_mask=mask, scale=float(scale), enable_gqa=gqa)


@cache
def _compiled(backend: str | Callable[..., object] = "inductor") -> Callable[..., Tensor]:
    # Set once: around each call it would cost a tenth of a millisecond.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _KERNELS)
    # An error if it can't be compiled: uncompiled it would make all of the T x T scores.
    return torch.compile(_attend, fullgraph=True, backend=backend)
