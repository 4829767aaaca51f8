"""The tables of docs/study.md, from docs/study/data/*.json: no number is typed by hand."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable
from typing import Any

from cells import (
    AUC,
    END,
    Data,
    Rows,
    arms_of,
    by_seed,
    collapsed,
    difference,
    done,
    mean_of,
    named,
    percent,
    plain,
    plus_minus,
    stresses,
)
from evidence import corrected, interactions, limits, placebos, steered

EPSILON = 3e-4
"""The lower side of the paper's clip range."""


def rewards(data: Data) -> Rows:
    """One row a stress: the arms' AUC, their differences, and what else sets them apart."""
    arms = arms_of(data)
    both, title = " / ".join(map(named, arms)), " - ".join(map(named, arms))
    rows = [[*data["summary"][0]["stress"], *(f"{named(arm)}, AUC" for arm in arms)]]
    rows[0] += [f"{title}, AUC", "at the end", f"collapsed, {both}", "clipped", "gradient norm"]
    for stress, _ in stresses(data):
        pairs = [[by_seed(data, arm, stress, metric) for arm in arms] for metric in (AUC, END)]
        norms = [mean_of(data, arm, stress, "optim/grad_norm") for arm in arms]
        clipped = [mean_of(data, arm, stress, "ratio/clip_fraction") for arm in arms]
        rows.append(
            [
                *map(plain, stress.values()),
                *map(plus_minus, pairs[0]),
                *(difference(*pair) for pair in pairs),
                " / ".join(collapsed(data, arm, stress) for arm in arms),
                " / ".join(percent(share) for share in clipped),
                " / ".join("-" if norm is None else f"{norm:.2f}" for norm in norms),
            ]
        )
    return rows


def clip_fractions(data: Data) -> Rows:
    """Shares of clipped tokens beside the paper's, and how narrow GSPO's range is here."""
    axes, arms = list(data["summary"][0]["stress"]), ("gspo", "grpo")
    rows = [
        [*axes, "GSPO", "without the first minibatch", "spread of l over 3e-4", "GRPO", "times"]
    ]
    rows.append(["paper, section 5.2", *[""] * len(axes[1:]), "15 %", "", "", "0.13 %", "115"])
    for stress, _ in stresses(data):
        clipped = [mean_of(data, arm, stress, "ratio/clip_fraction_tokens") for arm in arms]
        ours, theirs = clipped
        count = stress["minibatches"]
        # Nothing is clipped in the first minibatch: there the ratio is 1.
        later = None if ours is None else ours * count / (count - 1)
        square = mean_of(data, "gspo", stress, "ratio/log_square")
        spread = "-" if square is None else f"{math.sqrt(square) / EPSILON:.0f}"
        times = f"{ours / theirs:.0f}" if ours and theirs else "-"
        where = map(plain, stress.values())
        shares = (percent(ours, 1), percent(later), spread, percent(theirs, 2))
        rows.append([*where, *shares, times])
    return rows


def replay(data: Data) -> Rows:
    """One row an arm and engine: AUC, what the replay changes, and how much there was to do."""
    measured = {"experts changed": "moe/experts_changed", "choices agree": "moe/routing_agreement"}
    rows = [["engine", "arm", "AUC", "with - without, AUC", "at the end", "collapsed", *measured]]
    for stress, summaries in stresses(data):
        for arm in summaries:
            method = arm.split(" ")[0]
            pairs = [[by_seed(data, a, stress, m) for a in (arm, method)] for m in (AUC, END)]
            apart = ["-", "-"] if arm == method else [difference(*pair) for pair in pairs]
            changed, agree = (mean_of(data, arm, stress, name) for name in measured.values())
            where = (*map(plain, stress.values()), named(arm), plus_minus(pairs[0][0]))
            shares = (collapsed(data, arm, stress), percent(changed, 1), percent(agree, 2))
            rows.append([*where, *apart, *shares])
    return rows


def learned(data: Data) -> Rows:
    """Whether there was anything to compare: the reward at the end less that at the start."""
    arms = arms_of(data)
    rows = [["length", "reward before", *(f"{named(arm)}, after - before" for arm in arms)]]
    for stress, _ in stresses(data):
        before = by_seed(data, arms[0], stress, "reward_before")
        gains = [
            difference(*(by_seed(data, arm, stress, name) for name in (END, "reward_before")))
            for arm in arms
        ]
        rows.append([*map(plain, stress.values()), f"{statistics.fmean(before):.3f}", *gains])
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
                where = map(plain, stress.values())
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
    rows = [["completions", "arm", "AUC", "reward at the end", "sampled tokens"]]
    for stress, summaries in stresses(data):
        for arm, row in summaries.items():
            if row["seeds"]:
                found = [plus_minus(by_seed(data, arm, stress, metric)) for metric in (AUC, END)]
                where = map(plain, stress.values())
                rows.append([*where, named(arm), *found, f"{row['tokens']:,.0f}"])
    return rows


def ranges(data: Data) -> Rows:
    """Where the steered range ended."""
    rows = [["setting", "epsilon_low at the end, mean and extremes over seeds"]]
    for stress, _ in stresses(data):
        ends = [cell["ends"]["ratio/epsilon_low"] for cell in done(data, "auto", stress)]
        if ends:
            text = f"{statistics.fmean(ends):.2g} ({min(ends):.2g} to {max(ends):.2g})"
            rows.append([*map(plain, stress.values()), text])
    return rows


A, C, D, E, F, G = PARTS = (
    *("a-stability", "c-replay", "d-precision"),
    *("e-length", "f-compute", "g-epsilon"),
)
TABLES: dict[str, tuple[tuple[str, ...], Callable[..., Rows]]] = {
    "norms": (PARTS, limits),
    "a": ((A,), rewards),
    "b": ((A,), clip_fractions),
    "c": ((C,), replay),
    "placebo": ((C, D), placebos),
    "d": ((D,), rewards),
    "e": ((E,), rewards),
    "e-learned": ((E,), learned),
    "e-spread": ((E,), spreads),
    "f": ((F,), compute),
    "f-difference": ((F,), rewards),
    "f-interaction": ((F,), interactions),
    "g": ((G,), rewards),
    "g-range": ((G,), ranges),
    "g-grpo": ((G, A, D), steered),
    "holm": (PARTS, corrected),
}
"""Mark in docs/study.md -> the parts whose data it needs, and how its table is made."""


def made(known: dict[str, Data]) -> dict[str, str]:
    """Mark -> its table, for which there is data."""
    return {
        mark: markdown(make(*(known[part] for part in parts)))
        for mark, (parts, make) in TABLES.items()
        if set(parts) <= set(known)
    }


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
