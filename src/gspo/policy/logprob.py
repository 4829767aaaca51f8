"""Hidden states -> log-probs of given tokens, without ever holding the full logits.

The vocabulary projection is done in chunks of tokens and done again in the backward pass, so
that memory grows with chunk x vocabulary and not with tokens x vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gspo.timing import timed

CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Head:
    """The vocabulary projection of a causal LM: logits = cap(hidden @ weight.T + bias)."""

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None = None
    softcap: float | None = None
    """Final logits are softcap * tanh(logits / softcap), as in Gemma 2."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probs of M tokens and the entropy of the distributions that they were drawn from.

    Attributes:
        logprobs: [M] float32, with gradient.
        entropy: [M] float32, in nats, without gradient.
    """

    logprobs: Float[Tensor, " M"]
    entropy: Float[Tensor, " M"]

    def __post_init__(self) -> None:
        if self.logprobs.dtype != torch.float32:
            raise TypeError(f"log-probs are {self.logprobs.dtype}: l_i needs float32")


@timed("head")
def token_logprobs(
    hidden: Float[Tensor, "M D"],
    head: Head,
    targets: Int[Tensor, " M"],
    temperatures: Float[Tensor, " M"],
    chunk: int | None = None,
) -> TokenLogprobs:
    """log softmax(logits / temperature) at `targets`, in float32.

    Args:
        hidden: last hidden states at the positions before the targets.
        head: the projection; gradients reach `hidden` and, where it is trained, the head.
        targets: token ids.
        temperatures: above 0.
        chunk: tokens whose logits exist at once. None: `CHUNK_BYTES` of float32 logits.
    """
    if chunk is None:
        chunk = max(16, CHUNK_BYTES // (4 * head.weight.shape[0]))
    logprobs, entropy = _ChunkedLogprobs.apply(  # pyright: ignore[reportGeneralTypeIssues]
        hidden, head.weight, head.bias, targets, temperatures, head.softcap, chunk
    )
    return TokenLogprobs(logprobs, entropy)


def full_logits(hidden: Float[Tensor, "R D"], head: Head) -> Float[Tensor, "R V"]:
    """Float32 logits of a few positions, as decoding needs them."""
    return _logits(hidden, head.weight, head.bias, head.softcap)


class _ChunkedLogprobs(torch.autograd.Function):
    """Forward keeps log-sum-exp only; backward projects each chunk again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperatures, softcap, chunk):
        logprobs = hidden.new_empty(targets.shape, dtype=torch.float32)
        entropy = torch.empty_like(logprobs)
        normaliser = torch.empty_like(logprobs)
        for at in range(0, targets.shape[0], chunk):
            part = slice(at, at + chunk)
            logits = _logits(hidden[part], weight, bias, softcap)
            logits /= temperatures[part, None]
            normaliser[part] = logits.logsumexp(-1)
            logits -= normaliser[part, None]
            logprobs[part] = logits.gather(-1, targets[part, None]).squeeze(-1)
            # Not lse - E[logit], which cancels; the clamp turns 0 * -inf into 0.
            entropy[part] = -(logits.exp() * logits.clamp_(min=-1e4)).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, temperatures, normaliser)
        ctx.softcap, ctx.chunk = softcap, chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, *grads):
        hidden, weight, bias, targets, temperatures, normaliser = ctx.saved_tensors
        grad = grads[0]
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        for at in range(0, targets.shape[0], ctx.chunk):
            part = slice(at, at + ctx.chunk)
            raw = _logits(hidden[part], weight, bias, ctx.softcap)
            scale = temperatures[part, None]
            # d logprob / d (logit / T) = onehot - softmax
            d_logits = (raw / scale - normaliser[part, None]).exp_().neg_()
            rows = torch.arange(d_logits.shape[0], device=d_logits.device)
            d_logits[rows, targets[part]] += 1.0
            d_logits *= grad[part, None] / scale
            if ctx.softcap is not None:
                d_logits *= 1.0 - (raw / ctx.softcap).square_()
            if d_hidden is not None:
                d_hidden[part] = (d_logits @ weight.float()).to(hidden.dtype)
            if d_weight is not None:
                d_weight.addmm_(d_logits.t(), hidden[part].float())
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None


def _logits(
    hidden: Float[Tensor, "C D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"] | None,
    softcap: float | None,
) -> Float[Tensor, "C V"]:
    """Float32 logits, also under autocast: half precision here costs the whole clip range."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.float() @ weight.float().t()
        if bias is not None:
            logits += bias
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
    return logits
