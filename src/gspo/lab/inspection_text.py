"""An inspection as text: a table of methods, and the cosines of their gradients."""

from __future__ import annotations

import io

from rich import box
from rich.console import Console
from rich.table import Table

from gspo.lab.inspection_report import AtWeights, Inspection, Method

FEW = 6
"""Up to this many methods, the cosines of all pairs are printed unasked."""


def render(found: Inspection, *, matrix: bool = False) -> str:
    """The whole report; `matrix` prints the cosines of all pairs, however many there are."""
    console = Console(file=io.StringIO(), width=140, highlight=False, markup=False)
    console.print(
        f"{found.run}, step {found.step}: {_trajectories(found)}, {found.tokens:,} sampled tokens",
        soft_wrap=True,
    )
    console.print(f"its method: {_own(found)}", soft_wrap=True)
    for term in found.left_out:
        console.print(f"left out, being the same for every method: {term}")
    for at in found.at:
        console.print(f"\n{_weights(at)}", soft_wrap=True)
        console.print(_methods(at))
        if matrix or len(at.methods) <= FEW:
            console.print(f"cosines of the gradients, weights {at.weights} the step")
            console.print(_matrix(at))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _trajectories(found: Inspection) -> str:
    text = f"{found.trajectories} trajectories in {found.groups} groups"
    if found.flat_groups:
        text += f" ({found.flat_groups} with equal rewards)"
    if found.dropped:
        text += f", {found.dropped} too long and dropped"
    return f"{text}, {found.trained} with an advantage"


def _own(found: Inspection) -> str:
    given = ", ".join(f"{name}={value}" for name, value in found.options.items())
    return f"{found.own} ({given or 'all options at their defaults'})"


def _weights(at: AtWeights) -> str:
    text = f"weights {at.weights} the step ({at.source})"
    if at.log_ratio is None:
        return text
    spread = at.log_ratio
    return f"{text}; l_i {_number(spread.p50)} [{_number(spread.p01)}, {_number(spread.p99)}]"


def _methods(at: AtWeights) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("method")
    for name in ("range", "loss", "gradient norm", "clipped", "clipped tokens", "cosine"):
        table.add_column(name, justify="right")
    for method in at.methods:
        table.add_row(method.name, *_cells(method))
    return table


def _cells(method: Method) -> list[str]:
    low_high = "-" if method.epsilon is None else "/".join(f"{e:g}" for e in method.epsilon)
    return [
        low_high,
        f"{method.loss:.4g}",
        f"{method.grad_norm:.3g}",
        f"{method.clip_fraction:.1%}",
        f"{method.clip_fraction_tokens:.1%}",
        _cosine(method.cosine),
    ]


def _matrix(at: AtWeights) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for method in at.methods:
        table.add_column(method.name, justify="right")
    for method, row in zip(at.methods, at.cosines, strict=True):
        table.add_row(method.name, *(_cosine(value) for value in row))
    return table


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _number(value: float) -> str:
    return f"{value:.2g}"
