"""Triton kernels over blocks of logits: one pass where torch's operations take eight.

They do what `split_projection` does with torch's operations, in float32 too. They are for CUDA;
where there is no Triton, torch's operations stay.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import BFloat16, Float
from torch import Tensor

from gspo.kernels.split_projection import LogitBlock

_BLOCK = 2048
"""Logits of a token that a program holds at once."""


@triton.jit
@no_type_check  # compiled from its source
def _capped(x, cap):
    """cap * tanh(x / cap); by exp, as Triton has no tanh of its own."""
    return cap * (1.0 - 2.0 / (tl.exp(2.0 * x / cap) + 1.0))


@triton.jit
@no_type_check  # compiled from its source
def _add(
    logits, targets, scales, tops, totals, spreads, picks,
    start, cap,
    entries: tl.constexpr, CAPPED: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    logits += token.to(tl.int64) * entries
    scale = tl.load(scales + token)
    wanted = tl.load(targets + token) - start
    top, total, spread = -1e30, 0.0, 0.0
    if not FIRST:
        top, total = tl.load(tops + token), tl.load(totals + token)
        spread = tl.load(spreads + token)
    for begin in range(0, entries, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        inside = place < entries
        x = tl.load(logits + place, mask=inside, other=0.0)
        if CAPPED:
            x = _capped(x, cap)
        found = tl.sum(tl.where(place == wanted, x, 0.0), 0)
        if (wanted >= begin) & (wanted < begin + BLOCK) & (wanted < entries):
            tl.store(picks + token, found)
        new = tl.maximum(top, tl.max(tl.where(inside, x, -1e30), 0))
        rise = tl.where(total > 0, (new - top) * scale, 0.0)
        decay = tl.exp2(-rise)
        y = (x - new) * scale
        power = tl.where(inside, tl.exp2(y), 0.0)
        spread = (spread + total * rise) * decay - tl.sum(power * tl.maximum(y, -1e4), 0)
        total = total * decay + tl.sum(power, 0)
        top = new
    tl.store(tops + token, top)
    tl.store(totals + token, total)
    tl.store(spreads + token, spread)


def add(block: LogitBlock, picked: Float[Tensor, " C"]) -> None:
    """As `split_projection.add`."""
    softmax, span, logits, targets, start, softcap = block
    state = (softmax.max[span], softmax.total[span], softmax.spread[span])
    _add[(len(logits),)](  # pyright: ignore[reportIndexIssue]
        logits, targets, softmax.scale[span], *state, picked,
        start, softcap or 1.0,
        entries=logits.shape[1], CAPPED=softcap is not None, FIRST=start == 0, BLOCK=_BLOCK,
        num_warps=8,
    )  # fmt: skip


@triton.jit
@no_type_check  # compiled from its source
def _pull(
    logits, out, targets, scales, tops, totals, chosen, grads,
    entries, start, cap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = token.to(tl.int64) * entries
    x = tl.load(logits + row + place, mask=place < entries, other=0.0)
    slope = 1.0
    if CAPPED:
        x = _capped(x, cap)
        slope = 1.0 - (x / cap) * (x / cap)
    power = tl.exp2((x - tl.load(tops + token)) * tl.load(scales + token))
    at_target = place == tl.load(targets + token) - start
    rest = 1.0 - tl.load(chosen + token)
    pull = tl.where(at_target, rest, -power / tl.load(totals + token))
    pull = pull * slope * tl.load(grads + token)
    tl.store(out + row + place, pull.to(tl.bfloat16), mask=place < entries)


def pull(
    block: LogitBlock, chosen: Float[Tensor, " C"], grad: Float[Tensor, " C"]
) -> BFloat16[Tensor, "C K"]:
    """As `split_projection.pull`."""
    softmax, span, logits, targets, start, softcap = block
    out = torch.empty_like(logits, dtype=torch.bfloat16)
    grid = (len(logits), triton.cdiv(logits.shape[1], _BLOCK))
    _pull[grid](  # pyright: ignore[reportIndexIssue]
        logits, out, targets, softmax.scale[span], softmax.max[span], softmax.total[span],
        chosen, grad,
        logits.shape[1], start, softcap or 1.0,
        CAPPED=softcap is not None, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return out
