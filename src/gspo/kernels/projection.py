"""The vocabulary projection in blocks of tokens x vocabulary entries, with a running softmax.

What the backward pass costs depends on what is trained:

- A frozen head: the gradient of a token's log-prob by its hidden state is known up to one factor,
  the upstream gradient. The forward pass computes it from the logits at hand; backward scales it.
- A trained head: its gradient sums over tokens whose upstream gradients come only after the whole
  sequence is known. Backward projects again, but for what fits `KEPT_BYTES`, and for the tokens
  whose upstream gradient is zero, as a clipped sequence's are.
- No gradient: nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from gspo.kernels.running_softmax import LN_2, RunningSoftmax, log2_power_

KEPT_BYTES = 256 * 2**20
"""Exponentials of a trained head that wait for the backward pass instead of being recomputed."""


class Plan(NamedTuple):
    """How the logits are cut into blocks, and how they are capped."""

    rows: int
    columns: int
    softcap: float | None
    entries: int
    """Vocabulary entries that are tokens: the head's rows behind them are left out."""

    def tokens(self, count: int) -> list[slice]:
        return _blocks(count, self.rows)

    def vocabulary(
        self, weight: Tensor, bias: Tensor | None
    ) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Parts of the vocabulary with their float32 weights and their biases."""
        for part in _blocks(self.entries, self.columns):
            yield part, weight[part].float(), None if bias is None else bias[part]


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise([*range(0, count, size), count])]


def project(
    hidden: Float[Tensor, "C D"],
    weight: Float[Tensor, "K D"],
    bias: Float[Tensor, " K"] | None,
    softcap: float | None,
) -> Float[Tensor, "C K"]:
    """Float32 logits: half precision here costs the whole clip range. Not under autocast."""
    logits = hidden.float() @ weight.float().t()
    if bias is not None:
        logits += bias
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    return logits


class _Tokens(NamedTuple):
    """What is known of M tokens after the forward pass."""

    hidden: Float[Tensor, "M D"]
    targets: Int[Tensor, " M"]
    scale: Float[Tensor, " M"]
    max: Float[Tensor, " M"]
    total: Float[Tensor, " M"]
    """As in `RunningSoftmax`."""
    slope: Float[Tensor, " M"]
    """d (capped logit / temperature) / d logit at the target."""


class _Forward(NamedTuple):
    softmax: RunningSoftmax
    picked: Float[Tensor, " M"]
    """Logits of the targets."""
    pulled: Float[Tensor, "M D"] | None
    """Sum over the vocabulary of power * cap's slope * weight, where asked for."""
    kept: list[Tensor]
    """Per block: power * cap's slope, and the max that the powers are relative to."""


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor,
    plan: Plan,
    *,
    pull: bool,
    keep_bytes: int,
) -> _Forward:
    """One pass over the blocks. What is kept, is kept for all tokens of a part."""
    softmax, picked, kept = RunningSoftmax(temperatures), torch.zeros_like(temperatures), []
    pulled = torch.zeros_like(hidden, dtype=torch.float32) if pull else None
    for part, w, b in plan.vocabulary(weight, bias):
        keep_bytes -= 4 * targets.shape[0] * w.shape[0]
        keep = not pull and keep_bytes >= 0
        # In one piece: blocks that stay, between others that go, would leave holes in the heap.
        powers = temperatures.new_empty(targets.shape[0], w.shape[0]) if keep else None
        for rows in plan.tokens(targets.shape[0]):
            x = project(hidden[rows], w, b, plan.softcap)
            wanted = pull or keep
            slope = None if plan.softcap is None or not wanted else _cap_slope(x, plan.softcap)
            _pick(x, targets[rows] - part.start, picked[rows])
            out = None if powers is None else powers[rows]
            power, top, decay = softmax.add(rows, x, first=part.start == 0, out=out)
            if slope is not None:
                power.mul_(slope)
            if pulled is not None:
                older = pulled[rows] if decay is None else pulled[rows].mul_(decay[:, None])
                older.addmm_(power, w)
            elif keep:
                kept += power, top
    return _Forward(softmax, picked, pulled, kept)


def _pick(x: Float[Tensor, "C K"], at: Int[Tensor, " C"], picked: Float[Tensor, " C"]) -> None:
    """Copy each row's entry `at` to `picked`, where the block has it."""
    found = x.gather(-1, at.clamp(0, x.shape[1] - 1)[:, None]).squeeze(-1)
    torch.where((at >= 0) & (at < x.shape[1]), found, picked, out=picked)


class ChunkedLogprobs(torch.autograd.Function):
    """(log-probs, entropy) of the targets; see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, temperatures, plan, grad_enabled):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        trained = grad_enabled and (need_weight or need_bias)
        ctx.frozen = grad_enabled and need_hidden and not trained
        ctx.plan, ctx.dtype = plan, hidden.dtype
        temperatures = temperatures.float()
        out = _forward(
            hidden,
            weight,
            bias,
            targets,
            temperatures,
            plan,
            pull=ctx.frozen,
            keep_bytes=KEPT_BYTES if trained else -1,
        )
        softmax = out.softmax
        if trained or ctx.frozen:
            slope = temperatures.reciprocal()
            if plan.softcap is not None:
                slope *= _cap_slope(out.picked, plan.softcap)
            tokens = _Tokens(hidden, targets, softmax.scale, softmax.max, softmax.total, slope)
            if out.pulled is None:
                ctx.save_for_backward(weight, bias, *tokens, *out.kept)
            else:
                ctx.save_for_backward(_unit_gradient(weight, tokens, out.pulled))
        entropy = softmax.entropy()
        ctx.mark_non_differentiable(entropy)
        return softmax.logprobs(out.picked), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _entropy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.frozen:
                (unit,) = ctx.saved_tensors
                found = (unit * grad[:, None]).to(ctx.dtype), None, None
            else:
                weight, bias, *saved = ctx.saved_tensors
                tokens, kept = _Tokens(*saved[:6]), saved[6:]
                needs = ctx.needs_input_grad[:3]
                found = _backward(weight, bias, tokens, grad, kept, ctx.plan, needs)
        return *found, None, None, None, None


def _unit_gradient(
    weight: Tensor, tokens: _Tokens, pulled: Float[Tensor, "M D"]
) -> Float[Tensor, "M D"]:
    """d log-prob / d hidden of each token: its target's weight less the mean of all weights."""
    mean = pulled.mul_((LN_2 * tokens.scale / tokens.total)[:, None])
    return weight.index_select(0, tokens.targets).float().mul_(tokens.slope[:, None]).sub_(mean)


class _Gradients:
    """Gradients of hidden states, weight and bias, summed up block by block."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        tokens: _Tokens,
        grad: Float[Tensor, " M"],
        needs: Sequence[bool],
    ):
        self.targets, self.hidden = tokens.targets, tokens.hidden.float()
        # Up by the target, down by every entry in proportion to its power.
        self.up, self.down = tokens.slope * grad, -LN_2 * tokens.scale * grad / tokens.total
        self.d_hidden = self.d_weight = self.d_bias = None
        if needs[0]:
            self.d_hidden = weight.index_select(0, self.targets).float().mul_(self.up[:, None])
        if needs[1]:
            self.d_weight = torch.zeros_like(weight)
        if bias is not None and needs[2]:
            self.d_bias = torch.zeros_like(bias, dtype=torch.float32)
            self.d_bias.index_add_(0, self.targets, self.up)

    def add(
        self,
        part: slice,
        w: Float[Tensor, "K D"],
        blocks: Iterable[tuple[slice, Float[Tensor, "C K"], Float[Tensor, " C"] | float]],
    ) -> None:
        """A part of the vocabulary. Of each block: its tokens, power * cap's slope, a factor."""
        d_part = None
        if self.d_weight is not None:
            d_part = self.d_weight[part].float()  # a copy of a half-precision part
            targets, hidden, up = self.targets, self.hidden, self.up
            if d_part.shape[0] < self.d_weight.shape[0]:
                mine = ((targets >= part.start) & (targets < part.stop)).nonzero()[:, 0]
                targets, hidden, up = (x.index_select(0, mine) for x in (targets, hidden, up))
            d_part.index_add_(0, targets - part.start, hidden * up[:, None])
        for rows, power, factor in blocks:
            pull = self.down[rows] * factor
            if self.d_hidden is not None:
                self.d_hidden[rows].addcmul_(power @ w, pull[:, None])
            if d_part is not None:
                d_part.addmm_(power.t(), self.hidden[rows] * pull[:, None])
            if self.d_bias is not None:
                self.d_bias[part].addmv_(power.t(), pull)
        if self.d_weight is not None and d_part is not None:
            self.d_weight[part].copy_(d_part)


def _backward(
    weight: Tensor,
    bias: Tensor | None,
    tokens: _Tokens,
    grad: Float[Tensor, " M"],
    kept: Sequence[Tensor],
    plan: Plan,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias. Tokens without gradient are left out."""
    every, blocks = tokens.hidden, plan.tokens(grad.shape[0])
    live = None if bool(grad.all()) else grad.nonzero().squeeze(-1)
    places = blocks if live is None else _places(live, blocks)
    if live is not None:
        tokens, grad = _Tokens(*(own.index_select(0, live) for own in tokens)), grad[live]
    sums = _Gradients(weight, bias, tokens, grad, needs)
    pairs = iter(zip(kept[::2], kept[1::2], strict=True))

    def blocks_of(w: Tensor, b: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor | float]]:
        for block, rows in zip(blocks, places, strict=True):
            pair = next(pairs, None)
            if pair is None:
                yield rows, _powers(tokens, rows, w, b, plan.softcap), 1.0
                continue
            if live is not None:
                pair = [own[live[rows] - block.start] for own in pair]
            yield rows, pair[0], ((pair[1] - tokens.max[rows]) * tokens.scale[rows]).exp2()

    for part, w, b in plan.vocabulary(weight, bias):
        sums.add(part, w, blocks_of(w, b))
    d_hidden, d_bias = sums.d_hidden, sums.d_bias
    if d_hidden is not None:
        d_hidden = d_hidden.to(every.dtype)
        if live is not None:
            d_hidden = torch.zeros_like(every).index_copy_(0, live, d_hidden)
    return d_hidden, sums.d_weight, d_bias if bias is None or d_bias is None else d_bias.to(bias)


def _places(live: Int[Tensor, " L"], blocks: list[slice]) -> list[slice]:
    """Where the live tokens of each block are among all live tokens."""
    edges = torch.tensor([0, *(block.stop for block in blocks)], device=live.device)
    return [slice(*pair) for pair in pairwise(torch.searchsorted(live, edges).tolist())]


def _powers(
    tokens: _Tokens, rows: slice, w: Tensor, b: Tensor | None, softcap: float | None
) -> Float[Tensor, "C K"]:
    """Powers of a block, computed again, times the slope of the cap."""
    x = project(tokens.hidden[rows], w, b, softcap)
    slope = None if softcap is None else _cap_slope(x, softcap)
    power = log2_power_(x, tokens.max[rows], tokens.scale[rows]).exp2_()
    return power if slope is None else power.mul_(slope)


def _cap_slope(logits: Tensor, softcap: float) -> Tensor:
    """d (softcap * tanh(x / softcap)) / dx, from the capped logits."""
    return torch.addcmul(logits.new_ones(()), logits, logits, value=-(softcap**-2))
