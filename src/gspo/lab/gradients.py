"""Several methods on one rollout batch: the loss of each, and the gradient that it steps along.

The log-probs are the same for all methods, so each microbatch is forwarded once. A method is then
the vector d loss / d log-probs, and its gradient that vector times the Jacobian: one backward pass
per method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.data.packing import Microbatch, pack
from gspo.data.sample import Sample, unit_count
from gspo.dev import TrainConfig
from gspo.objective import policy_loss
from gspo.policy.load import Policy
from gspo.train.minibatches import RolloutBatch
from gspo.train.settings import Settings
from gspo.train.trainer import Reference

_SLICE = 1 << 20  # elements of a parameter that are multiplied in float64 at once


@dataclass
class MethodLoss:
    """One method over the whole batch as one optimizer step, and what it found so far.

    Attributes:
        settings: the objective, how its advantages are made, and whether flat groups count.
        advantages: A_i by trajectory.
        sequences, tokens: N and T.
        policy, kl: the loss's two parts, as `policy_loss` returns them.
        scored: sequences with an advantage.
        clipped: of those, how many the range silences; a partly clipped one counts its share.
        scored_tokens, clipped_tokens: the same of their trained tokens.
        log_ratios: l_i of those sequences.
        gradient: of the loss, one tensor per trained parameter.
    """

    settings: Settings
    advantages: dict[int, float]
    sequences: int
    tokens: int
    policy: float = 0.0
    kl: float = 0.0
    scored: int = 0
    clipped: float = 0.0
    scored_tokens: int = 0
    clipped_tokens: int = 0
    log_ratios: list[float] = field(default_factory=list, repr=False)
    gradient: list[Tensor] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, batch: RolloutBatch, settings: Settings) -> MethodLoss:
        """A method that has seen nothing yet; `batch` has the advantages of `settings`."""
        counted = batch if settings.preset.counts_flat else batch.with_signal()
        unit = settings.sequence_unit
        return cls(
            settings=settings,
            advantages={
                samples[0].trajectory_id: samples[0].advantage for samples in batch.samples
            },
            sequences=sum(unit_count(samples, unit) for samples in counted.samples),
            tokens=sum(int(s.loss_mask.sum()) for samples in counted.samples for s in samples),
        )

    def wants(self, trajectory: int) -> bool:
        """Whether the trajectory has a gradient."""
        return self.settings.objective.kl_coef > 0 or self.advantages[trajectory] != 0

    def vector(
        self, microbatch: Microbatch, logprobs: Float[Tensor, " M"], reference: Tensor | None
    ) -> Float[Tensor, " M"]:
        """d loss / d log-probs of a microbatch, whose statistics are counted."""
        objective, device = self.settings.objective, logprobs.device
        leaf = logprobs.detach().requires_grad_()
        advantages = torch.tensor([self.advantages[t] for t in microbatch.trajectory_ids])
        sampling = microbatch.sampling_logprobs.to(device)
        out = policy_loss(
            leaf,
            microbatch.old_logprobs.to(device),
            microbatch.sequence_ids.to(device),
            advantages.to(device, torch.float32),
            objective,
            loss_mask=microbatch.loss_mask.to(device),
            total_sequences=max(self.sequences, 1),
            total_tokens=self.tokens,
            sampling_logprobs=None if objective.correction is None else sampling,
            reference_logprobs=reference if objective.kl_coef > 0 else None,
        )
        chosen = advantages != 0
        clipped, tokens = out.clipped_tokens.cpu()[chosen], out.loss_tokens.cpu()[chosen]
        self.policy += out.policy.item()
        self.kl += out.kl.item()
        self.scored += len(tokens)
        self.clipped += (clipped / tokens.clamp(min=1)).double().sum().item()
        self.scored_tokens += int(tokens.sum())
        self.clipped_tokens += int(clipped.sum())
        self.log_ratios += out.log_ratio.cpu()[chosen].tolist()
        return torch.autograd.grad(out.loss, leaf)[0]


def measure(
    policy: Policy,
    trajectories: Sequence[tuple[Sample, ...]],
    losses: Mapping[str, MethodLoss],
    options: TrainConfig,
    budget: int,
    reference: Reference | None = None,
) -> Float[Tensor, "P P"]:
    """Run the methods over the batch as one optimizer step; dot products of their gradients.

    Trajectories in which no method finds a gradient are left out, as in training. One gradient per
    method is held in float32. The `.grad` of the parameters stay as they were.

    Args:
        options: of the run; microbatches are made and routed as they say.
        budget: tokens of a microbatch.
        reference: needed if a method has a KL term.

    Raises:
        DataError: expert choices are to be replayed, and a microbatch has none.
    """
    wanted = [t for t in trajectories if any(m.wants(t[0].trajectory_id) for m in losses.values())]
    samples = [sample for of_trajectory in wanted for sample in of_trajectory]
    parameters = list(policy.trainable.values())
    for method in losses.values():
        method.gradient = [torch.zeros_like(p) for p in parameters]
    replay = options.routing_replay != "none"
    chunk = options.logprob_calculation_chunk_size
    policy.lm.eval()
    for microbatch in pack(samples, budget, options.sequence_unit):
        replayed = microbatch.replayed_choices() if replay else None
        with policy.routers.watch(replayed, strict=replay):
            logprobs = policy.logprobs(microbatch, chunk).logprobs
        base = None if reference is None else reference(microbatch)
        for method in losses.values():
            vector = method.vector(microbatch, logprobs, base)
            if not vector.any():
                continue
            parts = torch.autograd.grad(
                logprobs, parameters, vector, retain_graph=True, allow_unused=True
            )
            for total, part in zip(method.gradient, parts, strict=True):
                if part is not None:
                    total += part
        del logprobs  # and with it the graph, before the next one is made
    return gram([method.gradient for method in losses.values()])


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
    return [[None if math.isnan(value) else value for value in row] for row in matrix]
