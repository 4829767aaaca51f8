"""The gradient that a method steps along on a rollout batch, and how two gradients compare.

The loss and the gradient are those of the training step itself; only the optimizer is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.train.expert_replay import ExpertReplay
from gspo.train.minibatches import RolloutBatch
from gspo.train.observe import Observer
from gspo.train.settings import Settings
from gspo.train.trainer import Call, Trainer

_SLICE = 1 << 20  # elements of a parameter that are multiplied in float64 at once


def method_gradient(
    trainer: Trainer, batch: RolloutBatch, settings: Settings
) -> tuple[Observer, list[Tensor]]:
    """What training would observe, and its gradient, if the batch were one minibatch.

    Args:
        trainer: its policy's weights stay as they are.
        batch: has the advantages, old log-probs and expert choices that `settings` ask for.
        settings: of the method. The load-balancing loss of a router is left out.

    Returns:
        The metrics and traces; the gradient as one tensor per trained parameter, of 0 if nothing in
        the batch has a gradient.

    Raises:
        DataError: expert choices are to be replayed, and a sample has none.
        NumericsError: the loss is not finite.
    """
    policy = trainer.policy
    policy.lm.eval()
    settings = settings.model_copy(update={"router_aux_loss_coef": 0.0})
    observer = Observer(policy, batch)
    call = Call(
        settings, [batch.samples], ExpertReplay(policy, settings, observer.metrics), observer
    )
    trainer.gradient(batch.samples, call)
    parameters = policy.trainable.values()
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    trainer.optimizer.clear()
    return observer, gradient


def gram(gradients: Sequence[Sequence[Tensor]]) -> Float[Tensor, "P P"]:
    """Dot products of P gradients, each a list of tensors, summed in float64.

    >>> gram([[torch.tensor([3.0, 4.0])], [torch.tensor([1.0, 0.0])]]).tolist()
    [[25.0, 3.0], [3.0, 1.0]]
    """
    total = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for tensors in zip(*gradients, strict=True):
        flat = [tensor.detach().reshape(-1).split(_SLICE) for tensor in tensors]
        for pieces in zip(*flat, strict=True):
            block = torch.stack(pieces).double()
            total += (block @ block.t()).cpu()
    return (total + total.t()) / 2  # a product's two triangles may be rounded apart


def cosines(products: Float[Tensor, "P P"]) -> list[list[float | None]]:
    """Cosine of each pair of gradients from their dot products; None if one of the two is 0.

    >>> cosines(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    [[1.0, None], [None, None]]
    """
    norms = products.diag().sqrt()
    matrix = (products / norms.outer(norms)).clamp(-1, 1).tolist()
    return [[None if math.isnan(value) else value for value in values] for values in matrix]
