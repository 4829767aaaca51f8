"""Hidden states -> log-probs of given tokens, without ever holding the full logits.

`token_logprobs` says what is computed; `projection` computes it in blocks of tokens x vocabulary
entries, so that memory doesn't grow with tokens x vocabulary; `running_softmax` adds up the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from gspo.core.errors import DataError
from gspo.core.timing import span
from gspo.kernels.projection import Blocks, ChunkedLogprobs, capped_, entry_slices, project
from gspo.kernels.running_softmax import LN_2, RunningSoftmax
from gspo.kernels.split_projection import SplitLogprobs, split_product

CPU_BLOCK = (2048, 2**20)
"""Vocabulary entries, and logits, of one block: 4 MiB stay in the cache between two passes."""
DEVICE_BLOCK = (8192, 2**24)
"""The same for other devices, on which few large launches are faster."""
SPLIT_BLOCK = (8192, 2**26)
"""The same for split products. Blocks of twice that are 3 % faster on an H100."""


@dataclass(frozen=True)
class Head:
    """The vocabulary projection of a causal LM: logits = cap(scale * (hidden @ weight.T + bias)).

    >>> Head(torch.zeros(8, 2), entries=5).size
    5
    """

    weight: Float[Tensor, "W D"]
    bias: Float[Tensor, " W"] | None = None
    softcap: float | None = None
    """Final logits are softcap * tanh(logits / softcap), as in Gemma 2."""
    scale: float = 1.0
    """Granite, Cohere and others multiply their logits by a constant."""
    multiple: int = 1
    """Rows of a product are padded to a multiple of this (see `kernels.exact`)."""
    entries: int | None = None
    """How many entries of the head are tokens; None: all. The rest pads it, with probability 0."""
    split: bool = False
    """Products are those of split factors (see `kernels.split_projection`)."""

    @property
    def size(self) -> int:
        """V, the number of tokens that a distribution is over."""
        return min(self.weight.shape[0], self.entries or self.weight.shape[0])

    def scaled(
        self, hidden: Float[Tensor, "M D"]
    ) -> tuple[Float[Tensor, "M D"], Float[Tensor, " W"] | None]:
        """Multiply hidden states and bias by the scale, in float32; unchanged if it is 1."""
        if self.scale == 1.0:
            return hidden, self.bias
        return hidden.float() * self.scale, None if self.bias is None else self.bias * self.scale


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


@span("head")
def token_logprobs(
    hidden: Float[Tensor, "M D"],
    head: Head,
    targets: Int[Tensor, " M"],
    temperatures: Float[Tensor, " M"],
    chunk: int | None = None,
) -> TokenLogprobs:
    """log softmax(logits / temperature) at `targets`, in float32 whatever the head's dtype.

    Args:
        hidden: last hidden states at the positions before the targets.
        head: the projection; gradients reach `hidden` and, if it is trained, the head.
        targets: token ids; on the host they are checked without waiting for a device.
        temperatures: above 0.
        chunk: tokens whose logits exist at once. None: what the device's block leaves room for.

    Raises:
        DataError: a target that is no entry of the head's vocabulary.
    """
    _check_targets(targets, head.size)
    count, missing = len(targets), -len(targets) % head.multiple
    targets = targets.to(hidden.device, non_blocking=True)
    if missing:
        targets = functional.pad(targets, (0, missing))
        hidden = functional.pad(hidden, (0, 0, 0, missing))
        temperatures = functional.pad(temperatures, (0, missing), value=1.0)
    blocks = _blocks(hidden, head, chunk)
    hidden, bias = head.scaled(hidden)
    function = SplitLogprobs if head.split else ChunkedLogprobs
    logprobs, entropy = function.apply(  # pyright: ignore[reportGeneralTypeIssues]
        hidden, head.weight, bias, targets, temperatures, blocks, torch.is_grad_enabled()
    )
    if missing:
        logprobs, entropy = logprobs[:count], entropy[:count]
    return TokenLogprobs(logprobs, entropy)


def full_logits(hidden: Float[Tensor, "N D"], head: Head) -> Float[Tensor, "N V"]:
    """Float32 logits of a few positions, as decoding needs them."""
    count = len(hidden)
    if missing := -count % head.multiple:
        hidden = functional.pad(hidden, (0, 0, 0, missing))
    hidden, bias = head.scaled(hidden)
    bias = None if bias is None else bias[: head.size]
    if head.split:
        logits = split_product(hidden, head.weight[: head.size])
        return capped_(logits if bias is None else logits.add_(bias), head.softcap)[:count]
    if head.weight.dtype == torch.float32:
        return project(hidden, head.weight[: head.size], bias, head.softcap)[:count]
    # A half-precision head is never copied whole to float32, which takes longer than the rest.
    blocks = _blocks(hidden, head).of_vocabulary(head.weight, bias)
    parts = [project(hidden, w, b, head.softcap) for _, w, b in blocks]
    return torch.cat(parts, dim=1)[:count]


def softmax_of(
    logits: Float[Tensor, "R V"], temperatures: Float[Tensor, " R"]
) -> tuple[Float[Tensor, "R V"], RunningSoftmax]:
    """softmax(logits / temperature) of a few positions, with the bits of `token_logprobs`.

    Returns:
        The probabilities, each times the same factor per position, at least 1 (`total`); and the
        softmax, whose `logprobs` takes the logit of a token.
    """
    softmax, powers = RunningSoftmax(temperatures), torch.empty_like(logits)
    # A device has no bits to match, and one block is fewer launches.
    entries = CPU_BLOCK[0] if logits.device.type == "cpu" else logits.shape[1]
    everyone, tops = slice(0, len(logits)), []
    parts = entry_slices(logits.shape[1], entries)
    for part in parts:
        x = logits[:, part].clone(memory_format=torch.contiguous_format)
        first, out = part.start == 0, powers if len(parts) == 1 else None
        power, top, _ = softmax.add(everyone, x, first=first, out=out, spread=False)
        if out is None:
            powers[:, part] = power
        tops.append(top)
    for part, top in zip(parts[:-1], tops, strict=False):  # relative to the largest logit of all
        # Not exp2, whose last numbers differ.
        powers[:, part] *= ((top - softmax.max) * softmax.scale * LN_2).exp_()[:, None]
    return powers, softmax


def _blocks(hidden: Tensor, head: Head, chunk: int | None = None) -> Blocks:
    entries, logits = CPU_BLOCK if hidden.device.type == "cpu" else DEVICE_BLOCK
    entries, logits = SPLIT_BLOCK if head.split else (entries, logits)
    entries = min(head.size, entries)
    tokens = (chunk or max(16, logits // entries)) // head.multiple * head.multiple
    return Blocks(max(tokens, head.multiple), entries, head.size, head.softcap)


def _check_targets(targets: Int[Tensor, " M"], size: int) -> None:
    if targets.numel() == 0:
        return
    low, high = torch.stack(targets.aminmax()).tolist()
    if low < 0 or high >= size:
        raise DataError(
            f"token id {low if low < 0 else high} is not among the {size} entries of the model's "
            "vocabulary: take the rollouts' tokenizer from the model that is trained"
        )
