"""The numbers of an inspection: what each method makes of one stored batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from gspo.lab.audit_report import Summary, summarise
from gspo.lab.gradients import MethodLoss, cosines
from gspo.lab.inspection_source import Weights
from gspo.train.minibatches import RolloutBatch
from gspo.train.settings import Settings


@dataclass(frozen=True)
class Method:
    """One method on the whole batch, taken as one optimizer step.

    Attributes:
        epsilon: (low, high) in the method's own units; None where it has no range.
        sequences: N.
        loss: the surrogate's, without the KL term.
        kl: mean k3 against the base model; 0 without a KL term.
        grad_norm: of the loss with the KL term, before any clipping by norm.
        clip_fraction: share of the sequences that have a gradient to lose.
        clip_fraction_tokens: share of their tokens.
        cosine: with the gradient of the run's own method; None where one of the two is 0.
    """

    name: str
    epsilon: tuple[float, float] | None
    sequences: int
    loss: float
    kl: float
    grad_norm: float
    clip_fraction: float
    clip_fraction_tokens: float
    cosine: float | None


@dataclass(frozen=True)
class AtWeights:
    """All methods at one set of weights.

    Attributes:
        weights: `before` or `after` the step.
        source: where they come from.
        log_ratio: l_i of the sequences that the run's own method trains on; None without any.
        methods: the run's own first.
        cosines: of each pair of gradients, in their order.
    """

    weights: Weights
    source: str
    log_ratio: Summary | None
    methods: tuple[Method, ...]
    cosines: list[list[float | None]]


@dataclass(frozen=True)
class Inspection:
    """One stored batch; `as_json` is what `--json` prints.

    Attributes:
        own: name of the run's own method.
        options: of `dev.TrainConfig`, as the run had them.
        trajectories: in the batch, without the `dropped` ones that were too long.
        flat_groups: groups with equal rewards.
        trained: trajectories that have an advantage under the run's own method.
        tokens: sampled tokens of the batch.
        left_out: terms of the run's loss that are the same for every method and not shown.
    """

    run: str
    step: int
    own: str
    options: dict[str, Any]
    trajectories: int
    dropped: int
    groups: int
    flat_groups: int
    trained: int
    tokens: int
    left_out: tuple[str, ...]
    at: tuple[AtWeights, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain numbers, lists and texts."""
        return asdict(self)


Measured = tuple[Weights, str, Mapping[str, MethodLoss], Float[Tensor, "P P"]]


def make_report(
    run: Path, step: int, own: Settings, batch: RolloutBatch, measured: Sequence[Measured]
) -> Inspection:
    """Report what was measured.

    Args:
        batch: with the advantages of the run's own method.
        measured: at each of the weights: their name and source, the methods with the run's own
            first, and the dot products of their gradients.
    """
    trained = sum(samples[0].advantage != 0 for samples in batch.samples)
    balance = own.router_aux_loss_coef
    return Inspection(
        run=str(run),
        step=step,
        own=next(iter(measured[0][2])),
        options=own.model_dump(mode="json", exclude_unset=True),
        trajectories=len(batch.samples),
        dropped=batch.dropped,
        groups=len(set(batch.groups)),
        flat_groups=batch.flat_groups,
        trained=trained,
        tokens=sum(sample.sampled for samples in batch.samples for sample in samples),
        left_out=(f"router_aux_loss_coef={balance:g}",) if balance else (),
        at=tuple(_at(*one) for one in measured),
    )


def _at(
    weights: Weights, source: str, losses: Mapping[str, MethodLoss], gram: Float[Tensor, "P P"]
) -> AtWeights:
    matrix = cosines(gram)
    norms = gram.diag().sqrt().tolist()
    ratios = next(iter(losses.values())).log_ratios
    return AtWeights(
        weights,
        source,
        summarise(np.array(ratios)) if ratios else None,
        tuple(
            _method(name, loss, norm, row[0])
            for (name, loss), norm, row in zip(losses.items(), norms, matrix, strict=True)
        ),
        matrix,
    )


def _method(name: str, loss: MethodLoss, norm: float, cosine: float | None) -> Method:
    objective = loss.settings.objective
    ranged = objective.has_range
    return Method(
        name=name,
        epsilon=(objective.epsilon_low, objective.epsilon_high) if ranged else None,
        sequences=loss.sequences,
        loss=loss.policy,
        kl=loss.kl,
        grad_norm=norm,
        clip_fraction=loss.clipped / max(loss.scored, 1),
        clip_fraction_tokens=loss.clipped_tokens / max(loss.scored_tokens, 1),
        cosine=cosine,
    )
