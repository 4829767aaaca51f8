"""The gradient of one optimizer step: one microbatch after another, or several in threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from gspo.core.timing import span
from gspo.data.packing import Microbatch
from gspo.policy.load import Policy
from gspo.policy.workers import Workers

T = TypeVar("T")


def backward_each(
    policy: Policy,
    microbatches: Sequence[Microbatch],
    loss_of: Callable[[Microbatch], tuple[Tensor, T]],
    workers: Workers,
) -> Iterator[T]:
    """Add the gradient of each microbatch's loss to the parameters.

    The result has the same bits whichever worker ends first: with several, each returns its
    gradients, and they are added in the order of the microbatches.

    Args:
        policy: its trainable parameters get the gradient.
        microbatches: of one optimizer step.
        loss_of: the forward pass: the loss of a microbatch, and what else it returns.
        workers: threads or processes that compute one microbatch each.

    Yields:
        What else `loss_of` returned for each microbatch, in their order.
    """
    # Looked up only where they are needed: a GPU would wait for it.
    parameters = list(policy.trainable.values()) if workers.threads > 1 else []

    def backward(microbatch: Microbatch) -> tuple[T, Sequence[Tensor | None]]:
        loss, scored = loss_of(microbatch)
        with span("backward"):
            if workers.threads > 1:
                return scored, torch.autograd.grad(loss, parameters, allow_unused=True)
            workers.backward(loss)
            return scored, ()

    # The gradients of few microbatches only lie beside one another.
    most = workers.threads if workers.size == 1 else max(1, len(microbatches))
    for start in range(0, len(microbatches), most):
        turn = microbatches[start : start + most]
        for scored, gradients in workers.map(backward, turn):
            for parameter, gradient in zip(parameters, gradients, strict=False):
                if parameter.grad is None:
                    parameter.grad = gradient
                elif gradient is not None:
                    parameter.grad += gradient
            yield scored
    workers.finish(policy.lm)
