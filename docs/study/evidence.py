"""Tables of docs/study.md that look at several parts at once, or at how far one can be believed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from cells import AUC, END, Data, Rows, apart, arms_of, by_seed, difference, named, plain, stresses

from gspo.lab.statistics import holm, p_value

Pair = tuple[list[float], list[float]]
FLOAT32 = {"engine": "float32"}


def limits(*parts: Data) -> Rows:
    """In how many runs the limit of the gradient's norm acts."""
    rows = [["part", "runs", "mean norm above 1", "lowest and highest mean norm"]]
    for data in parts:
        norms = [c["means"]["optim/grad_norm"] for c in data["cells"] if c["status"] == "done"]
        above = str(sum(norm > 1 for norm in norms))
        rows.append([data["name"], str(len(norms)), above, f"{min(norms):.2f}, {max(norms):.2f}"])
    return rows


def placebos(replayed: Data, precision: Data) -> Rows:
    """Pairs of arms that are the same algorithm but for rounding, and how far they are apart."""
    rows = [["the same but for rounding", "AUC", "at the end", "spread over seeds: AUC, end"]]
    of_engine, of_trainer = (FLOAT32 | {"old_logprobs": whose} for whose in ("engine", "trainer"))
    for arm in ("gspo", "grpo"):
        sides = ((precision, arm, of_engine), (precision, arm, of_trainer))
        rows.append([f"{named(arm)}, engine's log-probs - trainer's", *_placebo(*sides)])
    for arm in ("gspo", "grpo"):
        sides = ((replayed, f"{arm} R2", FLOAT32), (replayed, f"{arm} R3", FLOAT32))
        rows.append([f"{named(arm)}, R2 - R3", *_placebo(*sides)])
    return rows


def _placebo(
    a: tuple[Data, str, dict[str, str]], b: tuple[Data, str, dict[str, str]]
) -> Iterator[str]:
    pairs = [(by_seed(*a, metric), by_seed(*b, metric)) for metric in (AUC, END)]
    yield from (difference(*pair) for pair in pairs)
    spreads = (statistics.stdev(x - y for x, y in zip(*pair, strict=True)) for pair in pairs)
    yield ", ".join(f"{spread:.3f}" for spread in spreads)


def interactions(data: Data) -> Rows:
    """Whether the difference between the methods changes with the size of the groups."""
    rows = [["GSPO - GRPO", "AUC", "at the end"]]
    for more, less in ((16, 8), (32, 16), (32, 8)):
        sizes = [
            [apart(data, "gspo", "grpo", {"completions": size}, metric) for size in (more, less)]
            for metric in (AUC, END)
        ]
        title = f"at {more} completions, less the same at {less}"
        rows.append([title, *(difference(*pair) for pair in sizes)])
    return rows


def steered(ranges: Data, stability: Data, precision: Data) -> Rows:
    """GSPO with a steered range against GRPO: cells of different parts, on the same seeds."""
    int4 = {"engine": "int4", "old_logprobs": "engine"}
    grpo = {
        "learning rate 1e-4": (stability, {"learning_rate": 1e-4, "minibatches": 4}),
        "learning rate 3e-4": (stability, {"learning_rate": 3e-4, "minibatches": 4}),
        "12 minibatches": (stability, {"learning_rate": 3e-4, "minibatches": 12}),
        "int4 engine": (precision, int4),
        "int4 engine; GRPO on the trainer's log-probs": (
            precision,
            int4 | {"old_logprobs": "trainer"},
        ),
    }
    rows = [["setting", "GSPO auto - GRPO, AUC", "at the end"]]
    for name, (data, stress) in grpo.items():
        setting = {"setting": name.split(";")[0]}
        pairs = (
            (by_seed(ranges, "auto", setting, metric), by_seed(data, "grpo", stress, metric))
            for metric in (AUC, END)
        )
        rows.append([name, *(difference(*pair) for pair in pairs)])
    return rows


def corrected(*parts: Data) -> Rows:
    """The differences that are left after Holm's correction for the number of all.

    A pair of runs that stands in several parts counts once, by the first of them.
    """
    rows = [["metric", "pair", "difference", "p", "p after Holm"]]
    for metric, title in ((AUC, "AUC"), (END, "at the end")):
        pairs = {
            str(pair): (name, pair)
            for data in reversed(parts)
            for name, pair in _pairs(data, metric)
        }
        judged = [
            (p, name, pair) for name, pair in pairs.values() if (p := p_value(*pair)) is not None
        ]
        shown = sum(p < 0.05 for p, _, _ in judged)
        after = holm([p for p, _, _ in judged])
        rows.append([f"{title}: {len(judged)} pairs, {shown} with p < 0.05", "", "", "", ""])
        for p, (alone, name, pair) in sorted(zip(after, judged, strict=True)):
            if p < 0.05:
                rows.append([title, name, difference(*pair), f"{alone:.4f}", f"{p:.3f}"])
    return rows


def _pairs(data: Data, metric: str) -> Iterator[tuple[str, Pair]]:
    """Every pair of arms that the tables of a part compare."""
    first, second, *more = arms_of(data)
    pairs = [(first, second)]
    if more:  # of routing replay: each arm with its method alone
        pairs = [(arm, arm.split(" ")[0]) for arm in arms_of(data) if " " in arm]
    for stress, _ in stresses(data):
        where = ", ".join(f"{axis} {plain(value)}" for axis, value in stress.items())
        for a, b in pairs:
            sides = (by_seed(data, a, stress, metric), by_seed(data, b, stress, metric))
            yield f"{named(a)} - {named(b)}, {where}", sides
