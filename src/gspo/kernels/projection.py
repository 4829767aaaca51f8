"""Log-probs from hidden states, block by block of the vocabulary, with their gradient.

The logits of M tokens over V entries are never there as a whole. One block of tokens x entries is
computed at a time and goes into a softmax that grows with each block (`running_softmax`). A power
is 2^((logit - max) / (temperature * ln 2)), so a probability is a power over the sum of all powers.

The gradient of a token's log-prob by its hidden state is the target's weight less the mean of all
weights, each weighed by its probability. What that costs depends on what is trained:

- Nothing: no power is kept.
- Only what lies below a frozen head: the forward pass has the powers at hand and computes this
  gradient at once, but for one factor per token, the upstream gradient. Backward multiplies by it.
- The head too: its gradient sums over tokens whose upstream gradients come only after the loss is
  known. Powers that fit `KEPT_BYTES` wait for the backward pass, the others are computed again.
  Tokens whose upstream gradient is zero, as those of a clipped sequence, are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from gspo.kernels.running_softmax import LN_2, RunningSoftmax, log2_power_

KEPT_BYTES = 256 * 2**20
"""Memory for the powers of a trained head that wait for the backward pass."""


class Blocks(NamedTuple):
    """How the logits are cut: one block of tokens x vocabulary entries exists at a time.

    Attributes:
        tokens: tokens of a block.
        entries: vocabulary entries of a block.
        vocabulary: V, the entries that are tokens; what the head has behind them is left out.
        softcap: logits are softcap * tanh(logits / softcap).
    """

    tokens: int
    entries: int
    vocabulary: int
    softcap: float | None

    def of_tokens(self, count: int) -> list[slice]:
        """Slices of `count` tokens."""
        return _slices(count, self.tokens)

    def of_vocabulary(
        self, weight: Tensor, bias: Tensor | None
    ) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Slices of the vocabulary, with their weights and biases."""
        for entries in entry_slices(self.vocabulary, self.entries):
            yield entries, weight[entries], None if bias is None else bias[entries]


def entry_slices(count: int, size: int) -> list[slice]:
    """Cut a vocabulary into slices of `size` entries; a rest of up to a 32nd of it stays with the
    last: on AMD, MKL sums products of few columns in another order than those of many.

    >>> [(part.start, part.stop) for part in entry_slices(4097, 2048)]
    [(0, 2048), (2048, 4097)]
    """
    slices = _slices(count, size)
    if len(slices) > 1 and count - slices[-1].start <= size // 32:
        slices[-2:] = [slice(slices[-2].start, count)]
    return slices


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise([*range(0, count, size), count])]


def project(
    hidden: Float[Tensor, "C D"],
    weight: Float[Tensor, "K D"],
    bias: Float[Tensor, " K"] | None,
    softcap: float | None,
) -> Float[Tensor, "C K"]:
    """Float32 logits: half precision here costs the whole clip range."""
    logits = hidden.float() @ weight.float().t()
    if bias is not None:
        logits += bias
    return capped_(logits, softcap)


def capped_(logits: Float[Tensor, "C K"], softcap: float | None) -> Float[Tensor, "C K"]:
    """softcap * tanh(logits / softcap), in place."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


class _Tokens(NamedTuple):
    """What backward needs of M tokens.

    Attributes:
        scale, max, total: as in `RunningSoftmax`.
        slope: d (capped logit / temperature) / d logit at the target.
    """

    hidden: Float[Tensor, "M D"]
    targets: Int[Tensor, " M"]
    scale: Float[Tensor, " M"]
    max: Float[Tensor, " M"]
    total: Float[Tensor, " M"]
    slope: Float[Tensor, " M"]


class ChunkedLogprobs(torch.autograd.Function):
    """(log-probs, entropy) of the targets; see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, temperatures, blocks, grad_enabled):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        trained = grad_enabled and (need_weight or need_bias)
        ctx.frozen = grad_enabled and need_hidden and not trained
        ctx.blocks = blocks
        temperatures = temperatures.float()
        inputs, keep_bytes = (hidden, weight, bias, targets), KEPT_BYTES if trained else -1
        softmax, picked, pulled, kept = _forward(
            *inputs, temperatures, blocks, pull=ctx.frozen, keep_bytes=keep_bytes
        )
        if trained or ctx.frozen:
            slope = temperatures.reciprocal()
            if blocks.softcap is not None:
                slope *= cap_slope(picked, blocks.softcap)
            tokens = _Tokens(hidden, targets, softmax.scale, softmax.max, softmax.total, slope)
            if pulled is None:
                ctx.save_for_backward(weight, bias, *tokens, *kept)
            else:
                # d log-prob / d hidden: the target's weight less the mean of all weights.
                pulled.mul_((LN_2 * tokens.scale / tokens.total)[:, None])
                up = weight.index_select(0, targets).float().mul_(slope[:, None])
                ctx.save_for_backward(up.sub_(pulled))
        entropy = softmax.entropy()
        ctx.mark_non_differentiable(entropy)
        return softmax.logprobs(picked), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _entropy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.frozen:
            (unit,) = ctx.saved_tensors
            return unit * grad[:, None], None, None, None, None, None, None
        weight, bias, *saved = ctx.saved_tensors
        tokens, kept = _Tokens(*saved[:6]), saved[6:]
        gradients = _backward(weight, bias, tokens, grad, kept, ctx.blocks)
        return *gradients, None, None, None, None


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor,
    blocks: Blocks,
    *,
    pull: bool,
    keep_bytes: int,
) -> tuple[RunningSoftmax, Float[Tensor, " M"], Float[Tensor, "M D"] | None, list[Tensor]]:
    """Pass over the blocks once.

    Returns:
        The softmax; the targets' logits; with `pull`, the sum over the vocabulary of power * cap's
        slope * weight; and for as many blocks as fit `keep_bytes`, power * cap's slope, and the max
        that the powers are relative to.
    """
    softmax, picked, kept = RunningSoftmax(temperatures), torch.zeros_like(temperatures), []
    pulled = torch.zeros_like(hidden, dtype=torch.float32) if pull else None
    for entries, w, b in blocks.of_vocabulary(weight, bias):
        w = w.float()  # once, not for each block of tokens
        keep_bytes -= 4 * targets.shape[0] * w.shape[0]
        keep = not pull and keep_bytes >= 0
        # In one piece: blocks that stay, between others that go, would leave holes in the heap.
        powers = temperatures.new_empty(targets.shape[0], w.shape[0]) if keep else None
        for span in blocks.of_tokens(targets.shape[0]):
            x = project(hidden[span], w, b, blocks.softcap)
            softcap = blocks.softcap if pull or keep else None
            slope = None if softcap is None else cap_slope(x, softcap)
            pick(x, targets[span] - entries.start, picked[span])
            out = None if powers is None else powers[span]
            power, top, decay = softmax.add(span, x, first=entries.start == 0, out=out)
            if slope is not None:
                power.mul_(slope)
            if pulled is not None:
                older = pulled[span] if decay is None else pulled[span].mul_(decay[:, None])
                older.addmm_(power, w)
            elif keep:
                kept += power, top
    return softmax, picked, pulled, kept


def pick(x: Float[Tensor, "C K"], entries: Int[Tensor, " C"], picked: Float[Tensor, " C"]) -> None:
    """Copy each token's entry of the block to `picked`, if the block has it."""
    values = x.gather(-1, entries.clamp(0, x.shape[1] - 1)[:, None]).squeeze(-1)
    torch.where((entries >= 0) & (entries < x.shape[1]), values, picked, out=picked)


def _backward(
    weight: Tensor,
    bias: Tensor | None,
    tokens: _Tokens,
    grad: Float[Tensor, " M"],
    stored: Sequence[Tensor],
    blocks: Blocks,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of hidden states, weight and bias. Tokens without gradient are left out."""
    inputs, cuts = tokens.hidden, blocks.of_tokens(grad.shape[0])
    chosen = np.flatnonzero(grad.cpu().numpy())  # on the host, so that a device is asked only once
    edges = np.searchsorted(chosen, [0, *(cut.stop for cut in cuts)]).tolist()
    live = None if len(chosen) == grad.shape[0] else torch.from_numpy(chosen).to(grad.device)
    if live is not None:
        tokens, grad = _Tokens(*(x.index_select(0, live) for x in tokens)), grad[live]
    pairs = iter(zip(stored[::2], stored[1::2], strict=True))

    def powers(w: Tensor, b: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor | float]]:
        """Of each block of tokens: power * cap's slope, kept or computed again, and a factor."""
        for cut, (start, stop) in zip(cuts, pairwise(edges), strict=True):
            span, pair = slice(start, stop), next(pairs, None)
            if pair is None:
                yield span, _powers(tokens, span, w, b, blocks.softcap), 1.0
                continue
            power, top = pair if live is None else (x[live[span] - cut.start] for x in pair)
            yield span, power, ((top - tokens.max[span]) * tokens.scale[span]).exp2()

    # Up by the target, and down by every entry in proportion to its power.
    up, down = tokens.slope * grad, -LN_2 * tokens.scale * grad / tokens.total
    hidden = tokens.hidden.float()
    d_hidden = weight.index_select(0, tokens.targets).float().mul_(up[:, None])
    d_weight = torch.zeros_like(weight, dtype=torch.float32)
    d_weight.index_add_(0, tokens.targets, hidden * up[:, None])
    d_bias = up.new_zeros(weight.shape[0]).index_add_(0, tokens.targets, up)
    for entries, w, b in blocks.of_vocabulary(weight, bias):
        w = w.float()
        for span, power, factor in powers(w, b):
            pull = down[span] * factor
            d_hidden[span].addcmul_(power @ w, pull[:, None])
            d_weight[entries].addmm_(power.t(), hidden[span] * pull[:, None])
            if bias is not None:
                d_bias[entries].addmv_(power.t(), pull)
    d_hidden = d_hidden.to(inputs.dtype)
    if live is not None:
        d_hidden = torch.zeros_like(inputs).index_copy_(0, live, d_hidden)
    return d_hidden, d_weight, None if bias is None else d_bias


def _powers(
    tokens: _Tokens, span: slice, w: Tensor, b: Tensor | None, softcap: float | None
) -> Float[Tensor, "C K"]:
    """Compute the powers of a block again, times the slope of the cap."""
    x = project(tokens.hidden[span], w, b, softcap)
    slope = None if softcap is None else cap_slope(x, softcap)
    power = log2_power_(x, tokens.max[span], tokens.scale[span]).exp2_()
    return power if slope is None else power.mul_(slope)


def cap_slope(logits: Tensor, softcap: float) -> Tensor:
    """d (softcap * tanh(x / softcap)) / dx, from the capped logits."""
    return torch.addcmul(logits.new_ones(()), logits, logits, value=-(softcap**-2))
