"""Several objectives on one rollout batch: the gradient that each would step along.

Their log-probs are the same, so each row is forwarded once. An objective is then the vector
d loss / d log-probs, and its gradient that vector times the Jacobian: one backward pass each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.core.errors import DataError
from gspo.data.packing import PackedBatch
from gspo.data.sample import unit_count
from gspo.objective import LossOutput, policy_loss
from gspo.policy.policy import Policy
from gspo.train.minibatches import RolloutBatch
from gspo.train.settings import Settings
from gspo.train.step import Reference

_SLICE = 1 << 20  # elements of a parameter that are multiplied in float64 at once


@dataclass
class MethodLoss:
    """One objective over the whole batch as one optimizer step, and what it found.

    Attributes:
        settings: the objective, how its advantages are made, and whether flat groups count.
        advantages: A_i by trajectory.
        sequences, tokens: N and T.
        policy, kl: the loss's two parts, as `policy_loss` returns them.
        scored: sequences with an advantage.
        clipped: of those, how many the range silences; a partly clipped one counts its share.
        scored_tokens, clipped_tokens: the same of trained tokens.
        log_ratios: l_i of those sequences.
        gradient: of the loss, one tensor a trained parameter.
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
        """An objective that has seen nothing yet; `batch` has the advantages of `settings`."""
        counted = batch if settings.counts_flat else batch.with_signal()
        unit = settings.options.sequence_unit
        return cls(
            settings=settings,
            advantages={own[0].trajectory_id: own[0].advantage for own in batch.samples},
            sequences=sum(unit_count(own, unit) for own in counted.samples),
            tokens=sum(int(s.loss_mask.sum()) for own in counted.samples for s in own),
        )

    def wants(self, trajectory: int) -> bool:
        """Whether the trajectory has a gradient."""
        return self.settings.objective.kl_coef > 0 or self.advantages[trajectory] != 0

    def vector(
        self, row: PackedBatch, logprobs: Float[Tensor, " M"], reference: Tensor | None
    ) -> Float[Tensor, " M"]:
        """d loss / d log-probs of a row, whose statistics are counted."""
        objective, device = self.settings.objective, logprobs.device
        leaf = logprobs.detach().requires_grad_()
        chosen = torch.tensor([self.advantages[t] != 0 for t in row.trajectory_ids])
        own = [self.advantages[t] for t in row.trajectory_ids]
        out = policy_loss(
            leaf,
            row.old_logprobs.to(device),
            row.sequence_ids.to(device),
            torch.tensor(own, dtype=torch.float32, device=device),
            objective,
            loss_mask=row.loss_mask.to(device),
            total_sequences=max(self.sequences, 1),
            total_tokens=self.tokens,
            sampling_logprobs=None
            if objective.correction is None
            else row.sampling_logprobs.to(device),
            reference_logprobs=reference if objective.kl_coef > 0 else None,
        )
        self._count(out, chosen)
        (vector,) = torch.autograd.grad(out.loss, leaf)
        return vector

    def _count(self, out: LossOutput, chosen: Tensor) -> None:
        self.policy += out.policy.item()
        self.kl += out.kl.item()
        share = (out.clipped_tokens / out.loss_tokens.clamp(min=1)).cpu().double()[chosen]
        self.scored += len(share)
        self.clipped += share.sum().item()
        self.scored_tokens += int(out.loss_tokens.cpu()[chosen].sum())
        self.clipped_tokens += int(out.clipped_tokens.cpu()[chosen].sum())
        self.log_ratios += out.log_ratio.cpu()[chosen].tolist()


def accumulate_gradients(
    policy: Policy,
    rows: Iterable[PackedBatch],
    methods: Mapping[str, MethodLoss],
    *,
    chunk: int | None = None,
    replay: bool = False,
    reference: Reference | None = None,
) -> Float[Tensor, "P P"]:
    """Run every method over the rows; returns the dot products of their gradients, float64.

    One gradient a method is held in float32. The parameters' own `.grad` stay as they were.

    Args:
        rows: of the trajectories that any method wants.
        methods: by name; the result's axes are in their order.
        chunk: tokens whose logits exist at once.
        replay: route with the rows' own routes.
        reference: needed where a method has a KL term.

    Raises:
        DataError: a replay of rows without routes.
    """
    parameters = list(policy.trainable.values())
    for method in methods.values():
        method.gradient = [torch.zeros_like(p) for p in parameters]
    policy.lm.eval()
    for row in rows:
        if replay and row.routes is None:
            raise DataError("a packed row without routes in a step that replays them")
        with policy.routing.observe(row.routes if replay else None, strict=replay):
            logprobs = policy.logprobs(row, chunk).logprobs
        known = None if reference is None else reference(row)
        for method in methods.values():
            vector = method.vector(row, logprobs, known)
            if not vector.any():
                continue
            parts = torch.autograd.grad(
                logprobs, parameters, vector, retain_graph=True, allow_unused=True
            )
            for total, part in zip(method.gradient, parts, strict=True):
                if part is not None:
                    total += part
        del logprobs  # and with it the graph, before the next row's is made
    return gram([method.gradient for method in methods.values()])


def gram(gradients: Sequence[Sequence[Tensor]]) -> Float[Tensor, "P P"]:
    """Dot products of P gradients, each a list of tensors, summed in float64.

    >>> gram([[torch.tensor([3.0, 4.0])], [torch.tensor([1.0, 0.0])]]).tolist()
    [[25.0, 3.0], [3.0, 1.0]]
    """
    total = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for parts in zip(*gradients, strict=True):
        flat = [part.detach().reshape(-1) for part in parts]
        for at in range(0, flat[0].numel(), _SLICE):
            block = torch.stack([own[at : at + _SLICE] for own in flat]).double()
            total += (block @ block.t()).cpu()
    return (total + total.t()) / 2  # a product's two triangles may be rounded apart


def cosines(products: Float[Tensor, "P P"]) -> list[list[float | None]]:
    """Cosine of each pair of gradients; None where one of the two is 0.

    >>> cosines(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    [[1.0, None], [None, None]]
    """
    norms = products.diag().sqrt().tolist()
    return [
        [
            max(-1.0, min(1.0, value / (norms[i] * norms[j]))) if norms[i] and norms[j] else None
            for j, value in enumerate(row)
        ]
        for i, row in enumerate(products.tolist())
    ]
