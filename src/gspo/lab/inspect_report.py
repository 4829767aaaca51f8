"""The text of an inspection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gspo.lab.tables import as_text, cells, table, text

FEW = 6
"""Up to this many methods, the cosines of all pairs are printed without being asked for."""
_COLUMNS = ("name", "epsilon", "loss", "grad_norm", "clip_fraction")
_COLUMNS += ("clip_fraction_tokens", "cosine")


def render(inspection: Mapping[str, Any], *, matrix: bool = False) -> str:
    """The object of `inspect_run` as text; `matrix` prints the cosines of however many methods."""
    options = ", ".join(f"{name}={value}" for name, value in inspection["options"].items())
    parts: list[Any] = [
        "{run}, step {step}: ".format(**inspection) + _trajectories(inspection),
        f"its method: {inspection['own']} ({options or 'all options at their defaults'})",
    ]
    if inspection["turns"]:
        parts.append("rewards of turns, and their advantages: mean [least, largest]")
        names = ("turn", "trajectories", "reward", "advantage")
        parts.append(table(cells(names, inspection["turns"])))
    for term in inspection["left_out"]:
        parts.append(f"left out, being the same for every method: {term}")
    for at in inspection["at"]:
        names = [method["name"] for method in at["methods"]]
        when = f"weights {at['weights']} the step"
        heading = f"\n{when} ({at['source']})"
        if at["log_ratio"] is not None:
            heading += "; l_i {p50:.2g} [{p01:.2g}, {p99:.2g}]".format(**at["log_ratio"])
        parts += [heading, table(cells(_COLUMNS, at["methods"]))]
        if matrix or len(names) <= FEW:
            pairs = zip(names, at["cosines"], strict=True)
            rows = [[name, *(text(value) for value in row)] for name, row in pairs]
            parts += [f"cosines of the gradients, {when}", table([["", *names], *rows])]
    return as_text(parts, width=140)


def _trajectories(inspection: Mapping[str, Any]) -> str:
    about = "{trajectories} trajectories in {groups} groups".format(**inspection)
    if inspection["flat_groups"]:
        about += f" ({inspection['flat_groups']} with equal rewards)"
    if inspection["dropped"]:
        about += f", {inspection['dropped']} too long and dropped"
    for reason, times in inspection["splits"].items():
        about += f", {times} split ({reason})"
    return about + ", {trained} with an advantage, {tokens:,} sampled tokens".format(**inspection)
