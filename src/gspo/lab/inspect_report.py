"""What an inspection says of one stored batch: the numbers, and the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from gspo.lab.audit_report import Summary
from gspo.lab.stored_step import Weights
from gspo.lab.text_table import as_text, table

FEW = 6
"""Up to this many methods, the cosines of all pairs are printed without being asked for."""


@dataclass(frozen=True)
class Method:
    """One method on the whole batch, taken as one optimizer step.

    Attributes:
        epsilon: (low, high) in the units of the method; None if it has no range.
        sequences: N.
        loss: the surrogate's, without the KL term.
        kl: mean k3 against the base model; 0 without a KL term.
        grad_norm: of the loss with the KL term, before any clipping by norm.
        clip_fraction: share of the sequences that have a gradient to lose.
        clip_fraction_tokens: share of their tokens.
        cosine: with the gradient of the run's own method; None if one of the two is 0.
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
    """One stored batch; `asdict` of it is what `--json` prints.

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


def render(inspection: Inspection, *, matrix: bool = False) -> str:
    """The report as text; `matrix` prints the cosines of all pairs of however many methods."""
    options = ", ".join(f"{name}={value}" for name, value in inspection.options.items())
    parts: list[str | Table] = [
        f"{inspection.run}, step {inspection.step}: {_trajectories(inspection)}, "
        f"{inspection.tokens:,} sampled tokens",
        f"its method: {inspection.own} ({options or 'all options at their defaults'})",
    ]
    parts += [f"left out, being the same for every method: {term}" for term in inspection.left_out]
    for at in inspection.at:
        names = [method.name for method in at.methods]
        columns = ("range", "loss", "gradient norm", "clipped", "clipped tokens", "cosine")
        heading = f"\nweights {at.weights} the step ({at.source})"
        if at.log_ratio is not None:
            low, middle, high = at.log_ratio.p01, at.log_ratio.p50, at.log_ratio.p99
            heading += f"; l_i {middle:.2g} [{low:.2g}, {high:.2g}]"
        parts += [heading, table(("method", *columns), [_cells(method) for method in at.methods])]
        if matrix or len(names) <= FEW:
            pairs = zip(names, at.cosines, strict=True)
            cosines = [[name, *(_cosine(value) for value in row)] for name, row in pairs]
            parts.append(f"cosines of the gradients, weights {at.weights} the step")
            parts.append(table(("", *names), cosines))
    return as_text(parts, width=140)


def _trajectories(inspection: Inspection) -> str:
    text = f"{inspection.trajectories} trajectories in {inspection.groups} groups"
    if inspection.flat_groups:
        text += f" ({inspection.flat_groups} with equal rewards)"
    if inspection.dropped:
        text += f", {inspection.dropped} too long and dropped"
    return f"{text}, {inspection.trained} with an advantage"


def _cells(method: Method) -> list[str]:
    return [
        method.name,
        "-" if method.epsilon is None else "/".join(f"{e:g}" for e in method.epsilon),
        f"{method.loss:.4g}",
        f"{method.grad_norm:.3g}",
        f"{method.clip_fraction:.1%}",
        f"{method.clip_fraction_tokens:.1%}",
        _cosine(method.cosine),
    ]


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
