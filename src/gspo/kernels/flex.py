"""A packed row on a GPU: one call of flex_attention, whose kernel skips what no token sees.

Who sees whom is that of `policy/prefix.py`: `q` sees `k` where k <= q < until[k], and where `k` is
not older than the layer's window. A BlockMask says it for blocks of 128 x 128 tokens; inside those
that are seen in part, the kernel asks `sees`. No T x T mask is made.

    until = [3, 3, 3, 5, 5] of two samples, of 3 and of 2 tokens:  1 . . . .
                                                                   1 1 . . .
                                                                   1 1 1 . .
                                                                   . . . 1 .
                                                                   . . . 1 1

The kernel is compiled once: rows differ in their lengths, which it takes for variables, and in
what they show it, which are tensors of one shape whatever the window. On the CPU flex_attention has
no backward pass and runs uncompiled, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from gspo.kernels.shared_prompt_attention import RowAttention

BLOCK = 128
_FEWEST = 2  # blocks in a row: torch.compile takes a size of 1 for a constant
_KERNELS = 64  # that a process may compile: one for each shape of heads, precision and need of grad


@dataclass(frozen=True)
class Sight:
    """What a row's tokens see of it, in one kind of layer; P = T padded to whole blocks.

    Attributes:
        until: [P] first token after `k` that doesn't see it.
        positions: [P] of `k` in its samples.
        oldest: [P] the last position that `q` doesn't see.
    """

    until: Int[Tensor, " P"]
    positions: Int[Tensor, " P"]
    oldest: Int[Tensor, " P"]

    def mask(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """A mask_mod of flex_attention."""
        until, positions, oldest = self.until, self.positions, self.oldest

        @no_type_check
        def sees(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (q < until[k]) & (positions[k] > oldest[q])

        return sees

    def blocks(self) -> tuple[Bool[Tensor, "N N"], Bool[Tensor, "N N"]]:
        """Blocks of queries x blocks of keys: those that may be seen in part, and those that are
        seen wholly. From each key's span of queries, so that T x T / 128 is all that it costs."""
        places = torch.arange(len(self.until), device=self.until.device)
        start = places[::BLOCK, None]  # of each block of queries
        end = start + BLOCK
        oldest = self.oldest.view(-1, BLOCK, 1)
        some = (places < end) & (self.until > start) & (self.positions > oldest.amin(1))
        every = (places <= start) & (self.until >= end) & (self.positions > oldest.amax(1))
        whole = every.unflatten(1, (-1, BLOCK)).all(-1)
        return some.unflatten(1, (-1, BLOCK)).any(-1) & ~whole, whole


class FlexRow:
    """Built for one forward pass of a row, used by all of its layers."""

    def __init__(self, row: RowAttention):
        self.size = row.size
        self.padded = max(-(-row.size // BLOCK), _FEWEST) * BLOCK
        extra = self.padded - row.size
        until, positions = (
            torch.from_numpy(own).to(row.device, torch.int32) for own in (row.until, row.positions)
        )
        padding = torch.arange(row.size, self.padded, dtype=torch.int32, device=row.device)
        self._until = torch.cat([until, padding + 1])  # it sees itself: no softmax over nothing
        self._positions = functional.pad(positions, (0, extra))
        self._known: dict[int | None, BlockMask] = {}

    def sight(self, window: int | None) -> Sight:
        """For layers whose tokens see the last `window` positions, themselves included."""
        oldest = self._positions - (self.padded if window is None else window)
        return Sight(self._until, self._positions, oldest)

    def within(self, window: int | None) -> BlockMask:
        """The same for the kernel, made once for each window."""
        if window not in self._known:
            sight = self.sight(window)
            some, whole = sight.blocks()
            self._known[window] = BlockMask.from_kv_blocks(
                *_listed(some),
                *_listed(whole),
                BLOCK_SIZE=BLOCK,
                mask_mod=sight.mask(),
                seq_lengths=(self.padded, self.padded),
            )
        return self._known[window]

    def attend(
        self,
        query: Float[Tensor, "1 H T D"],
        key: Float[Tensor, "1 K T D"],
        value: Float[Tensor, "1 K T E"],
        scaling: float | None,
        window: int | None,
    ) -> Float[Tensor, "1 T H E"]:
        """Attention of the whole row."""
        kind = query.device.type
        mixed = torch.is_autocast_enabled(kind)  # SDPA is cast by autocast, this is not everywhere
        dtype = torch.get_autocast_dtype(kind) if mixed else value.dtype
        extra = (0, 0, 0, self.padded - self.size)
        q, k, v = (functional.pad(x.to(dtype), extra) for x in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = _kernel(kind)(q, k, v, self.within(window), repr(scale))
        return out[:, :, : self.size].transpose(1, 2)


def _listed(blocks: Bool[Tensor, "N N"]) -> tuple[Int[Tensor, "1 1 N"], Int[Tensor, "1 1 N N"]]:
    """How many blocks each row of the table has, and which: these first."""
    order = blocks.byte().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1).int()[None, None], order.int()[None, None]


@no_type_check  # it is traced, as `sees` is: no place for the checks of the tests
def _attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: str) -> Tensor:
    """`scale` is written out: of a number that changes, torch.compile makes a variable, and the
    kernel needs a constant."""
    gqa = q.shape[1] != k.shape[1]
    out = flex_attention(q, k, v, block_mask=mask, scale=float(scale), enable_gqa=gqa)
    assert isinstance(out, Tensor)
    return out


def _kernel(kind: str) -> Callable[..., Tensor]:
    return _attend if kind == "cpu" else _compiled()


@cache
def _compiled(backend: str | Callable[..., object] = "inductor") -> Callable[..., Tensor]:
    # Where it can't be compiled, an error: run uncompiled it would make all of the T x T scores.
    attend = torch.compile(_attend, fullgraph=True, backend=backend)

    def limited(*arguments: object) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=_KERNELS):
            return attend(*arguments)

    return limited
