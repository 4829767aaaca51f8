"""What the study's tables are made of: cells of docs/study/data/*.json, and numbers as text."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from gspo.experiment.heldout import share_interval
from gspo.lab.statistics import paired_difference, t_interval

Data = dict[str, Any]
Rows = list[list[str]]
Stress = dict[str, Any]

NAMES = {"gspo": "GSPO", "grpo": "GRPO"}
AUC, END = "auc", "reward_after"


def named(arm: str) -> str:
    """An arm as the text calls it."""
    first, *rest = arm.split(" ")
    return " ".join([NAMES.get(first, first), *rest])


def arms_of(data: Data) -> list[str]:
    """The arms, in their order."""
    return list(dict.fromkeys(row["arm"] for row in data["summary"]))


def stresses(data: Data) -> Iterator[tuple[Stress, dict[str, Data]]]:
    """Each stress with its summaries by arm."""
    seen: list[Stress] = []
    for row in data["summary"]:
        if row["stress"] not in seen:
            seen.append(row["stress"])
    for stress in seen:
        yield stress, {r["arm"]: r for r in data["summary"] if r["stress"] == stress}


def done(data: Data, arm: str, stress: Stress) -> list[Data]:
    """The finished cells of an arm under a stress."""
    cells = [c for c in data["cells"] if c["arm"] == arm and c["stress"] == stress]
    return [cell for cell in cells if cell["status"] == "done"]


def by_seed(data: Data, arm: str, stress: Stress, metric: str) -> list[float]:
    """A metric of an arm under a stress, in the order of seeds."""
    cells = sorted(done(data, arm, stress), key=lambda cell: cell["seed"])
    return [cell[metric] for cell in cells]


def apart(data: Data, a: str, b: str, stress: Stress, metric: str) -> list[float]:
    """What arm `a` is above arm `b` by, in the order of seeds."""
    pairs = zip(*(by_seed(data, arm, stress, metric) for arm in (a, b)), strict=True)
    return [x - y for x, y in pairs]


def mean_of(data: Data, arm: str, stress: Stress, metric: str) -> float | None:
    """Mean over steps, then over seeds."""
    values = [c["means"][metric] for c in done(data, arm, stress) if metric in c["means"]]
    return statistics.fmean(values) if values else None


def difference(a: list[float], b: list[float]) -> str:
    """a - b, paired by seed; in bold if the interval leaves out 0."""
    found = paired_difference(a, b)
    if found.low is None or found.high is None:
        return f"{found.mean:+.3f}"
    text = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    return f"**{text}**" if found.low > 0 or found.high < 0 else text


def plus_minus(values: list[float]) -> str:
    """A mean over seeds and half of its interval."""
    found = t_interval(values)
    alone = f"{found.mean:.3f}"
    if found.high is None:
        return alone
    return f"{alone}\u00a0±\u00a0{found.high - found.mean:.3f}"  # on one line of a narrow table


def collapsed(data: Data, arm: str, stress: Stress) -> str:
    """The share of collapsed seeds and its interval."""
    cells = done(data, arm, stress)
    found = share_interval(sum(cell["collapsed"] for cell in cells), len(cells))
    low, high = ("-" if end is None else f"{100 * end:.0f}" for end in (found.low, found.high))
    return f"{percent(found.mean)} [{low}, {high}]"


def percent(value: float | None, digits: int = 0) -> str:
    """A share as percent; '-' if it was not measured."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def plain(value: Any) -> str:
    """A setting's value."""
    return f"{value:g}" if isinstance(value, float) else str(value)
