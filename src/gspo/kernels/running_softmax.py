"""Softmax over a vocabulary whose logits arrive block by block."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

LN_2 = math.log(2)
VECTOR = 32  # numbers; vectors are shorter, and a thread's share is whole vectors
_LOWEST = -1e30  # finite: the difference of two lowest values is 0 and not NaN


def log2_power_(
    x: Float[Tensor, "C K"], top: Float[Tensor, " C"], scale: Float[Tensor, " C"]
) -> Float[Tensor, "C K"]:
    """(x - top) * scale in place: log2 of exp((x - top) / temperature).

    The max is subtracted first: a product would round what the logits of a token have in common.
    """
    return x.sub_(top[:, None]).mul_(scale[:, None])


class RunningSoftmax:
    """softmax(logits / temperature) of M tokens, and its entropy.

    It counts in powers of 2, as flash attention does: on the CPU torch's exp2 takes a third of the
    time of its exp, which takes up to thirty times as long for results near the smallest float.

    Attributes:
        scale: [M] 1 / (temperature * ln 2).
        max: [M] the largest logit so far. Powers are relative to it: 2^((logit - max) * scale).
        total: [M] the sum of the powers so far.
        spread: [M] the sum of power * log2(1 / power). The entropy is log2(total) + spread / total:
            neither term is negative, so nothing cancels.

    >>> softmax = RunningSoftmax(torch.ones(1))
    >>> for number, block in enumerate(([[0.0, 0.0]], [[math.log(2)]])):
    ...     _ = softmax.add(slice(0, 1), torch.tensor(block), first=number == 0)
    >>> softmax.logprobs(torch.tensor([math.log(2)])).exp()
    tensor([0.5000])
    """

    def __init__(self, temperatures: Float[Tensor, " M"]):
        self.scale = (temperatures * LN_2).reciprocal_()
        self.max, self.total, self.spread = self.scale.new_zeros(3, *self.scale.shape)

    def add(
        self,
        tokens: slice,
        x: Float[Tensor, "C K"],
        *,
        first: bool,
        out: Float[Tensor, "C K"] | None = None,
        spread: bool = True,
    ) -> tuple[Float[Tensor, "C K"], Float[Tensor, " C"], Float[Tensor, " C"] | None]:
        """Take in the next logits of some tokens.

        Args:
            tokens: whose logits they are.
            x: the logits; they are overwritten.
            first: these tokens have no logits yet.
            out: where the powers are written; None: to new memory.
            spread: add up what the entropy needs.

        Returns:
            The powers of `x`, the max that these are relative to, and the factor by which the
            powers that were added before shrink (None if there are none).
        """
        top, total = self.max[tokens], self.total[tokens]
        decay = None
        # A token whose entries are all banned so far would give -inf - -inf.
        new = x.amax(-1).clamp_(min=_LOWEST)
        if not first:
            rise = (torch.maximum(top, new, out=new) - top).mul_(self.scale[tokens])
            decay = (rise * -LN_2).exp_()  # not exp2: its last numbers differ (see `exp2`)
            self.spread[tokens].addcmul_(total, rise).mul_(decay)
            total.mul_(decay)
        top.copy_(new)
        power = exp2(log2_power_(x, new, self.scale[tokens]), out)
        total.add_(power.sum(-1))
        # A banned entry's logit is -inf, and 0 * -inf would be NaN.
        if spread:
            self.spread[tokens] -= x.clamp_(min=-1e4).mul_(power).sum(-1)
        return power, new, decay

    def logprobs(
        self, logits: Float[Tensor, "*S"], tokens: Int[Tensor, " K"] | None = None
    ) -> Float[Tensor, "*S"]:
        """Log-probs in nats of one entry per token, given its logit; or of several entries of each
        of these tokens, [K, E], with the same bits."""
        top, scale, total = self.max, self.scale, self.total.log2()
        if tokens is not None:
            top, scale, total = (x[tokens][:, None] for x in (top, scale, total))
        return ((logits - top) * scale - total) * LN_2

    def entropy(self) -> Float[Tensor, " M"]:
        """Entropies in nats."""
        return (self.total.log2() + self.spread / self.total) * LN_2


def exp2(x: Float[Tensor, "*C"], out: Float[Tensor, "*C"] | None) -> Float[Tensor, "*C"]:
    """2^x, of the same bits wherever a number stands.

    On the CPU torch computes the last numbers of a tensor, which don't fill a vector, otherwise
    than the rest. So they get company.
    """
    missing = -x.numel() % (VECTOR * torch.get_num_threads()) if x.device.type == "cpu" else 0
    if missing == 0:
        return torch.exp2(x, out=out)
    power = torch.nn.functional.pad(x.flatten(), (0, missing)).exp2_()[: x.numel()].view(x.shape)
    return power if out is None else out.copy_(power)
