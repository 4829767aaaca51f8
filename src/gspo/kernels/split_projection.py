"""Log-probs from hidden states on a GPU: float32 products as bfloat16 products of split factors.

A GPU multiplies bfloat16 ten times as fast as float32. A float32 number is the sum of two bfloat16
numbers up to 2^-17 of itself: x = high + low. Of the four products of two such factors the one of
both low parts is as small as what is lost anyway. The other three are one product, three times as
long, whose terms are summed in float32:

    [a_low, a_high, a_high] . [b_high, b_low, b_high]

The small terms come first: tensor cores cut off what they add to a large sum. Factors that are
bfloat16 already need no second part, and lose nothing.

The logits are computed in the blocks of `projection`. The backward pass computes a block again and
turns it into the gradient of its logits: (one at the target - probability) x upstream gradient /
temperature. It is a gradient of bfloat16 products like those of the layers below: the factors are
rounded, and so is what is computed. But the probability of the target is the exact one, and the
difference is taken before it is rounded: a probability near 1 loses nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from gspo.kernels.projection import cap_slope, capped_, pick
from gspo.kernels.running_softmax import LN_2, RunningSoftmax, log2_power_


def split_product(a: Float[Tensor, "M D"], b: Float[Tensor, "K D"]) -> Float[Tensor, "M K"]:
    """a @ b.T in float32, up to 2^-16 of the size of its terms."""
    return rounded_product(left_factor(a, b.dtype), right_factor(b, a.dtype))


def left_factor(x: Float[Tensor, "M D"], other: torch.dtype) -> BFloat16[Tensor, "M L"]:
    """The parts of x, the small ones first, as a factor of something of another type.

    >>> left_factor(torch.tensor([[1.0 + 2**-9]]), torch.float32).tolist()
    [[0.001953125, 1.0, 1.0]]
    """
    high, *low = _parts(x)
    return torch.cat([*low, high, high] if other != torch.bfloat16 else [*low, high], 1)


def right_factor(x: Float[Tensor, "K D"], other: torch.dtype) -> BFloat16[Tensor, "K L"]:
    """What each part of a `left_factor` is multiplied by.

    >>> right_factor(torch.tensor([[1.0 + 2**-9]]), torch.float32).tolist()
    [[1.0, 0.001953125, 1.0]]
    """
    high, *low = _parts(x)
    return torch.cat([high, *low, high] if other != torch.bfloat16 else [*low, high], 1)


def _parts(x: Tensor) -> list[Tensor]:
    """The bfloat16 number next to x, and, if x is wider, the one next to what that lacks."""
    high = x.bfloat16()
    return [high] if x.dtype == torch.bfloat16 else [high, (x - high).bfloat16()]


def rounded_product(a: BFloat16[Tensor, "M L"], b: BFloat16[Tensor, "K L"]) -> Float[Tensor, "M K"]:
    """a @ b.T, summed in float32."""
    if a.device.type == "cuda":
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    return a.float() @ b.float().t()


class LogitBlock(NamedTuple):
    """Logits of C tokens over K entries of the vocabulary, which are not capped yet.

    Attributes:
        softmax: of all tokens.
        span: which of them these are.
        start: the first of the entries.
    """

    softmax: RunningSoftmax
    span: slice
    logits: Float[Tensor, "C K"]
    targets: Int[Tensor, " C"]
    start: int
    softcap: float | None


class SplitLogprobs(torch.autograd.Function):
    """(log-probs, entropy) of the targets, as of `projection.ChunkedLogprobs`."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, temperatures, blocks, grad_enabled):
        softmax = RunningSoftmax(temperatures.float())
        picked = torch.zeros_like(softmax.scale)
        kernels = _kernels(hidden.device.type)
        left = left_factor(hidden, weight.dtype)
        for entries, w, b in blocks.of_vocabulary(weight, bias):
            right = right_factor(w, hidden.dtype)
            for span in blocks.of_tokens(len(targets)):
                x = _logits(left[span], right, b)
                block = LogitBlock(softmax, span, x, targets[span], entries.start, blocks.softcap)
                kernels.add(block, picked[span])
        logprobs = softmax.logprobs(picked)
        ctx.blocks = blocks
        if grad_enabled:
            state = softmax.scale, softmax.max, softmax.total
            ctx.save_for_backward(hidden, weight, bias, targets, logprobs, *state)
        entropy = softmax.entropy()
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _entropy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, targets, logprobs, *state = ctx.saved_tensors
        softmax = RunningSoftmax(torch.ones_like(grad))
        softmax.scale, softmax.max, softmax.total = state
        blocks, kernels = ctx.blocks, _kernels(grad.device.type)
        _, need_weight, need_bias = ctx.needs_input_grad[:3]
        chosen, rounded = logprobs.exp(), hidden.bfloat16()
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        for entries, w, b in blocks.of_vocabulary(weight, bias):
            w = w.bfloat16()
            for span in blocks.of_tokens(len(targets)):
                x = _logits(rounded[span], w, b)
                up = grad[span] * softmax.scale[span] * LN_2  # upstream gradient / temperature
                block = LogitBlock(softmax, span, x, targets[span], entries.start, blocks.softcap)
                pull = kernels.pull(block, chosen[span], up)
                d_hidden[span] += rounded_product(pull, w.t())
                if d_weight is not None:
                    d_weight[entries] += rounded_product(pull.t(), rounded[span].t())
                if d_bias is not None:
                    d_bias[entries] += pull.sum(0, dtype=torch.float32)
        return d_hidden, d_weight, d_bias, None, None, None, None


def _logits(
    left: BFloat16[Tensor, "C L"], right: BFloat16[Tensor, "K L"], bias: Float[Tensor, " K"] | None
) -> Float[Tensor, "C K"]:
    x = rounded_product(left, right)
    return x if bias is None else x.add_(bias)


def add(block: LogitBlock, picked: Float[Tensor, " C"]) -> None:
    """Take the logits into the softmax of their tokens, and the targets' among them into `picked`.
    They may be overwritten."""
    softmax, span, logits, targets, start, softcap = block
    logits = capped_(logits, softcap)
    pick(logits, targets - start, picked)
    softmax.add(span, logits, first=start == 0)


def pull(
    block: LogitBlock, chosen: Float[Tensor, " C"], grad: Float[Tensor, " C"]
) -> BFloat16[Tensor, "C K"]:
    """The gradient of the logits: (one at the target - probability) * cap's slope * `grad`,
    rounded. The targets' probabilities are `chosen`."""
    softmax, span, logits, targets, start, softcap = block
    logits = capped_(logits, softcap)
    slope = None if softcap is None else cap_slope(logits, softcap)
    power = log2_power_(logits, softmax.max[span], softmax.scale[span]).exp2_()
    share = power.div_(softmax.total[span][:, None]).neg_()
    at_target = torch.arange(share.shape[1], device=share.device) == (targets - start)[:, None]
    share = torch.where(at_target, (1 - chosen)[:, None], share)
    if slope is not None:
        share.mul_(slope)
    return share.mul_(grad[:, None]).bfloat16()


@cache
def _kernels(device: str) -> Any:
    """What has `add` and `pull` for a device: Triton's kernels, or this module."""
    if device == "cuda" and importlib.util.find_spec("triton"):
        from gspo.kernels import logit_kernels

        return logit_kernels
    return sys.modules[__name__]
