"""The tables of docs/study.md, from docs/study/data/*.json: no number is typed by hand."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator
from typing import Any

Data = dict[str, Any]
Rows = list[list[str]]

NAMES = {"gspo": "GSPO", "grpo": "GRPO"}


def named(arm: str) -> str:
    """An arm as the text calls it."""
    first, *rest = arm.split(" ")
    return " ".join([NAMES.get(first, first), *rest])


def stresses(data: Data) -> Iterator[tuple[dict[str, Any], dict[str, Data]]]:
    """Each stress with its summaries by arm."""
    seen: list[dict[str, Any]] = []
    for row in data["summary"]:
        if row["stress"] not in seen:
            seen.append(row["stress"])
    for stress in seen:
        yield stress, {r["arm"]: r for r in data["summary"] if r["stress"] == stress}


def done(data: Data, arm: str, stress: dict[str, Any]) -> list[Data]:
    """The finished cells of an arm under a stress."""
    cells = [c for c in data["cells"] if c["arm"] == arm and c["stress"] == stress]
    return [cell for cell in cells if cell["status"] == "done"]


def mean_of(data: Data, arm: str, stress: dict[str, Any], metric: str) -> float | None:
    """Mean over steps, then over seeds."""
    values = [c["means"][metric] for c in done(data, arm, stress) if metric in c["means"]]
    return statistics.fmean(values) if values else None


def rewards(data: Data) -> Rows:
    """One row a stress: the arms' held-out rewards, their differences, and what collapsed."""
    arms = list(dict.fromkeys(row["arm"] for row in data["summary"]))
    axes = list(data["summary"][0]["stress"])
    title = f"{named(arms[0])} - {named(arms[1])}"
    rows = [[*axes, "seeds", *map(named, arms), title, "collapsed", "clipped", "of tokens"]]
    for stress, own in stresses(data):
        pair = _pair(data, arms[0], arms[1], stress)
        rows.append(
            [
                *map(_plain, stress.values()),
                "/".join(dict.fromkeys(str(row["seeds"]) for row in own.values())),
                *(_plus_minus(own[arm]["reward_after"]) for arm in arms),
                _difference(pair),
                *(
                    " / ".join(_percent(own[arm][key]) for arm in arms)
                    for key in ("collapsed", "clip_fraction", "clip_fraction_tokens")
                ),
            ]
        )
    return rows


def clip_fractions(data: Data) -> Rows:
    """Shares of clipped tokens beside the paper's; all tokens of a clipped sequence are clipped."""
    axes = list(data["summary"][0]["stress"])
    rows = [[*axes, "GSPO, sequences", "GSPO, tokens", "GRPO, tokens", "GSPO / GRPO, tokens"]]
    rows.append(["GSPO paper, section 5.2", *[""] * len(axes[1:]), "", "15 %", "0.13 %", "115"])
    for stress, own in stresses(data):
        sequences = own["gspo"]["clip_fraction"]
        ours, theirs = (own[arm]["clip_fraction_tokens"] for arm in ("gspo", "grpo"))
        times = f"{ours / theirs:.0f}" if ours and theirs else "-"
        shares = (_percent(sequences, 1), _percent(ours, 1), _percent(theirs, 2))
        rows.append([*map(_plain, stress.values()), *shares, times])
    return rows


def replay(data: Data) -> Rows:
    """One row an arm and engine: reward, what the replay changes, and how much there was to do."""
    metrics = ("moe/experts_changed", "moe/routing_agreement", "ratio/clip_fraction")
    measured = ("experts changed", "engine's routes agree", "clipped")
    rows = [["engine", "arm", "seeds", "reward", "with - without", "collapsed", *measured]]
    for stress, own in stresses(data):
        for arm, row in own.items():
            pair = _pair(data, arm, arm.split(" ")[0], stress)
            found = [mean_of(data, arm, stress, metric) for metric in metrics]
            ends = (_plus_minus(row["reward_after"]), _difference(pair), _percent(row["collapsed"]))
            shares = (_percent(found[0], 1), _percent(found[1], 2), _percent(found[2]))
            where = map(_plain, stress.values())
            rows.append([*where, named(arm), str(row["seeds"]), *ends, *shares])
    return rows


def spreads(data: Data) -> Rows:
    """Spread of tokens' and sequences' log-ratios against length."""
    rows = [["answer", "arm", "L", "spread of d", "of l", "of d over sqrt(L)", "l / that"]]
    for stress, own in stresses(data):
        for arm in own:
            found = spread(data, arm, stress)
            if found is not None:
                length, token, sequence = found
                alone = token / math.sqrt(length)
                numbers = (f"{token:.2g}", f"{sequence:.2g}", f"{alone:.2g}")
                where = map(_plain, stress.values())
                share = f"{sequence / alone:.2f}"
                rows.append([*where, named(arm), f"{length:.0f}", *numbers, share])
    return rows


def spread(data: Data, arm: str, stress: dict[str, Any]) -> tuple[float, float, float] | None:
    """Mean length, and the root mean squares of d_t and l_i, over steps and seeds."""
    names = ("tokens/completion_mean", "ratio/token_log_square", "ratio/log_square")
    length, token, sequence = (mean_of(data, arm, stress, name) for name in names)
    if length is None or token is None or sequence is None:
        return None
    return length, math.sqrt(token), math.sqrt(sequence)


def compute(data: Data) -> Rows:
    """Reward against what was sampled for it."""
    rows = [["completions", "arm", "seeds", "reward", "AUC", "sampled tokens", "seconds"]]
    for stress, own in stresses(data):
        for arm, row in own.items():
            if row["seeds"]:
                found = (_plus_minus(row["reward_after"]), _plus_minus(row["auc"]))
                cost = (f"{row['tokens']:,.0f}", f"{row['seconds']:.0f}")
                where = map(_plain, stress.values())
                rows.append([*where, named(arm), str(row["seeds"]), *found, *cost])
    return rows


def ranges(data: Data) -> Rows:
    """Where the steered range ended."""
    rows = [["setting", "epsilon_low at the end, mean and extremes over seeds"]]
    for stress, own in stresses(data):
        arm = next(arm for arm in own if arm == "auto")
        ends = [cell["ends"]["ratio/epsilon_low"] for cell in done(data, arm, stress)]
        if ends:
            text = f"{statistics.fmean(ends):.2g} ({min(ends):.2g} to {max(ends):.2g})"
            rows.append([*map(_plain, stress.values()), text])
    return rows


TABLES: dict[str, tuple[str, Callable[[Data], Rows]]] = {
    "a": ("a-stability", rewards),
    "b": ("a-stability", clip_fractions),
    "c": ("c-replay", replay),
    "d": ("d-precision", rewards),
    "e": ("e-length", rewards),
    "e-spread": ("e-length", spreads),
    "f": ("f-compute", compute),
    "f-difference": ("f-compute", rewards),
    "g": ("g-epsilon", rewards),
    "g-range": ("g-epsilon", ranges),
}
"""Mark in docs/study.md -> the part's data, and how its table is made."""


def markdown(rows: Rows) -> str:
    """A table whose first row is its head.

    >>> print(markdown([["a", "b"], ["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def filled(text: str, tables: dict[str, str]) -> str:
    """`text` with every table between its marks.

    >>> filled("<!-- table:a -->old<!-- /table -->", {"a": "new"})
    '<!-- table:a -->\\nnew\\n<!-- /table -->'
    """

    def put(match: re.Match[str]) -> str:
        own = tables.get(match[1])
        return match[0] if own is None else f"<!-- table:{match[1]} -->\n{own}\n<!-- /table -->"

    return re.sub(r"<!-- table:(\S+) -->.*?<!-- /table -->", put, text, flags=re.DOTALL)


def _pair(data: Data, a: str, b: str, stress: dict[str, Any]) -> Data | None:
    """The paired difference a - b of the reward at the end, whichever way it is stored."""
    for row in data["paired"]:
        if row["stress"] == stress and row["metric"] == "reward_after":
            if (row["a"], row["b"]) == (a, b):
                return row
            if (row["a"], row["b"]) == (b, a):
                low = None if row["high"] is None else -row["high"]
                high = None if row["low"] is None else -row["low"]
                return row | {"difference": -row["difference"], "low": low, "high": high}
    return None


def _difference(pair: Data | None) -> str:
    """In bold where the interval leaves 0 out."""
    if pair is None or not pair["n"]:
        return "-"
    if pair["low"] is None:
        return f"{pair['difference']:+.3f}"
    text = f"{pair['difference']:+.3f} [{pair['low']:+.3f}, {pair['high']:+.3f}]"
    return f"**{text}**" if pair["low"] > 0 or pair["high"] < 0 else text


def _plus_minus(value: Data | None) -> str:
    if value is None:
        return "-"
    alone = f"{value['mean']:.3f}"
    return alone if value["high"] is None else f"{alone} ± {value['high'] - value['mean']:.3f}"


def _percent(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
