"""The charts of a run; of several runs, one curve each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from gspo.lab.report.data import RunData
from gspo.lab.report.figure import (
    WINDOW,
    Chart,
    Values,
    band,
    bars,
    color_of,
    curve,
    dash_of,
    dots,
    over_steps,
    rule,
    smoothed,
)
from gspo.lab.report.notices import notices
from gspo.lab.report.plain import (
    CLIPPED,
    ENTROPY,
    EXPERTS,
    FLAT,
    KL,
    LENGTH,
    LOAD,
    RATE,
    SPEED,
    Plain,
)

Traces = list[dict[str, Any]]
_SMOOTH_FROM = 30
"""Runs with fewer steps are shown as they are."""
TIMES = (
    ("time/rollout", "rollout", "@blue"),
    ("time/train", "train", "@orange"),
    ("time/publish", "publish", "@purple"),
    ("time/checkpoint", "checkpoint", "@green"),
)


def sections(runs: Sequence[RunData]) -> list[tuple[str, list[Chart]]]:
    """Titles and charts; a chart without data is left out, and so is a section without charts."""
    by_title: list[tuple[str, list[Chart | None]]] = [
        ("Learning", [_reward(runs), _plain(ENTROPY, runs), _plain(KL, runs), _plain(FLAT, runs)]),
        ("The clip", [_plain(CLIPPED, runs), _ratios(runs), _noise(runs)]),
        ("Optimizer", [_gradient(runs), _plain(RATE, runs)]),
        ("Experts", [_plain(EXPERTS, runs), _plain(LOAD, runs)]),
        ("Cost", [_time(runs), _tokens(runs), _plain(LENGTH, runs), _plain(SPEED, runs)]),
    ]
    known = [(title, [chart for chart in charts if chart]) for title, charts in by_title]
    return [(title, charts) for title, charts in known if charts]


def _chart(
    runs: Sequence[RunData], id: str, title: str, note: str, data: Traces, layout: dict[str, Any]
) -> Chart | None:
    if not any(value is not None for trace in data for value in trace["y"]):
        return None
    warnings = [
        f"{run.label}: {text}" if len(runs) > 1 else text
        for run in runs
        for text in notices(run).get(id, ())
    ]
    return Chart(id, title, note, data, layout, warnings)


def _each(
    runs: Sequence[RunData], draw: Callable[[RunData, str, str, str], Traces], own: str
) -> Traces:
    """`draw(run, label, color, dash)` for each run; one run is labelled `own`."""
    if len(runs) == 1:
        return draw(runs[0], own, "@blue", "solid")
    return [
        trace
        for index, run in enumerate(runs)
        for trace in draw(run, run.label, color_of(index), dash_of(index))
    ]


def _plain(chart: Plain, runs: Sequence[RunData]) -> Chart | None:
    def one(run: RunData, key: str, label: str, color: str, dash: str) -> Traces:
        steps, values = run.series(key)
        if chart.unless_zero and not any(values):
            return []
        values = smoothed(values) if _is_smooth(chart, run) else values
        return [curve(label, steps, values, color, dash=dash)] if steps else []

    first = chart.curves[0]
    if len(runs) == 1:
        data = [t for c in chart.curves for t in one(runs[0], c.key, c.label, c.color, c.dash)]
    else:
        data = _each(runs, lambda run, *style: one(run, first.key, *style), "")
    note = chart.note
    if len(runs) > 1 and len(chart.curves) > 1:
        note += f" Here: {first.label}."
    if any(_is_smooth(chart, run) for run in runs):
        note += f" Mean of {WINDOW} steps."
    options = {"rangemode": "tozero"} if chart.from_zero else {}
    return _chart(runs, chart.id, chart.title, note, data, over_steps(chart.kind, **options))


def _is_smooth(chart: Plain, run: RunData) -> bool:
    return chart.smooth and run.steps >= _SMOOTH_FROM


def _reward(runs: Sequence[RunData]) -> Chart | None:
    single = len(runs) == 1

    def draw(run: RunData, label: str, color: str, dash: str) -> Traces:
        steps, values = run.series("train/reward")
        data = []
        if single:
            raw = curve("train, one batch", steps, values, f"{color}/0.4", width=1, mode="lines")
            data.append(raw)
        data.append(curve(label, steps, smoothed(values), color, dash=dash, mode="lines"))
        measured = run.heldout()
        if measured:
            x, mean, low, high = (list(column) for column in zip(*measured, strict=True))
            name = "held-out" if single else f"{label}, held-out"
            found = dots(name, x, mean, low, high, "@orange" if single else color)
            data.append(found if single else found | {"showlegend": False})
        return data

    data = _each(runs, draw, f"train, mean of {WINDOW}")
    note = f"Train: the step's own batch, as a mean of {WINDOW} steps. Dots: held-out prompts, with"
    note += " the 95 % interval over prompts."
    return _chart(runs, "reward", "Reward", note, data, over_steps())


def _ratios(runs: Sequence[RunData]) -> Chart | None:
    def draw(run: RunData, label: str, color: str, dash: str) -> Traces:
        steps, low = run.series("ratio/log_p01")
        _, high = run.series("ratio/log_p99")
        data = band("1 % to 99 %" if len(runs) == 1 else "", steps, low, high, color)
        return [*data, curve(label, *run.series("ratio/log_p50"), color, dash=dash)]

    data = _each(runs, draw, "median")
    note = "l_i: the mean of d_t = log π - log π_old over the tokens of a sequence, in nats."
    if len(runs) == 1 and runs[0].by_sequence:
        note += " Between the dashed lines nothing is clipped."
        data += _clip_range(runs[0])
    elif len(runs) == 1:
        note += " This method clips tokens, not sequences: it has no range to compare with."
    return _chart(runs, "ratios", "Log-ratios of sequences", note, data, over_steps())


def _clip_range(run: RunData) -> Traces:
    steps, low = run.series("ratio/epsilon_low")
    _, high = run.series("ratio/epsilon_high")
    lower = [math.log1p(-v) if v is not None and v < 1 else None for v in low]
    upper = [math.log1p(v) if v is not None else None for v in high]
    edges = [rule("clip range", steps, values) for values in (lower, upper)]
    edges[1]["showlegend"] = False
    return edges if steps else []


def _noise(runs: Sequence[RunData]) -> Chart | None:
    def positive(run: RunData, key: str) -> tuple[list[int], Values]:
        steps, values = run.series(key)
        return steps, [abs(v) if v else None for v in values]

    def draw(run: RunData, label: str, color: str, dash: str) -> Traces:
        return [
            curve(label, *positive(run, "mismatch/sequence_log_ratio_abs_max"), color, dash=dash)
        ]

    data = _each(runs, draw, "largest |l_i| of a sequence")
    known = any(value is not None for trace in data for value in trace["y"])
    if not known:
        return None
    if len(runs) == 1:
        (run,) = runs
        tokens = positive(run, "mismatch/log_ratio_abs_max")
        data += [
            curve("largest |d_t| of a token", *tokens, "@orange"),
            curve("bias, |mean d_t|", *positive(run, "mismatch/log_ratio_mean"), "@green"),
        ]
        if run.by_sequence:
            data.append(rule("ε below 1", *positive(run, "ratio/epsilon_low")))
    note = "What engine and trainer disagree by on the weights that sampled, in nats, on a"
    note += " logarithmic scale. It has to lie below the clip range."
    return _chart(runs, "noise", "Engine against trainer", note, data, over_steps("log"))


def _gradient(runs: Sequence[RunData]) -> Chart | None:
    def draw(run: RunData, label: str, color: str, dash: str) -> Traces:
        steps, values = run.series("optim/grad_norm")
        data = [curve(label, steps, values, color, dash=dash)]
        settings = run.settings
        if len(runs) == 1 and steps and settings and settings.max_grad_norm is not None:
            limit = settings.max_grad_norm
            data.append(rule("clipped above", [steps[0], steps[-1]], [limit, limit]))
        return data

    note = "Before clipping, mean over the optimizer steps of a step."
    data = _each(runs, draw, "gradient norm")
    return _chart(runs, "gradient", "Gradient norm", note, data, over_steps(rangemode="tozero"))


def _time(runs: Sequence[RunData]) -> Chart | None:
    layout = {"barmode": "stack", "bargap": 0.1} | over_steps(ticksuffix=" s", rangemode="tozero")
    title = "Time per step"
    if len(runs) > 1:
        data = _each(runs, lambda r, n, c, d: [curve(n, *r.series("time/step"), c, dash=d)], "")
        return _chart(runs, "time", title, "Seconds, without evaluations.", data, layout)
    (run,) = runs
    parts = [(label, *run.series(key), color) for key, label, color in TIMES]
    data = [bars(*part) for part in parts if part[1]]
    whole = dict(zip(*run.series("time/step"), strict=True))
    if whole:
        known = dict.fromkeys(whole, 0.0)
        for _, steps, values, _ in parts:
            for step, value in zip(steps, values, strict=True):
                known[step] = known.get(step, 0.0) + (value or 0.0)
        rest = [max((whole[s] or 0.0) - known[s], 0.0) for s in whole]
        data.append(bars("rest", list(whole), rest, "@grey"))
    return _chart(runs, "time", title, "Seconds, without evaluations.", data, layout)


def _tokens(runs: Sequence[RunData]) -> Chart | None:
    layout = {"barmode": "stack", "bargap": 0.1} | over_steps("count")
    title, key = "Tokens per step", "tokens/completion"
    if len(runs) > 1:
        data = _each(runs, lambda r, n, c, d: [curve(n, *r.series(key), c, dash=d)], "")
        return _chart(runs, "tokens", title, "Sampled tokens.", data, layout)
    parts = ((key, "sampled", "@blue"), ("tokens/prompt", "prompts", "@grey"))
    data = [bars(label, *runs[0].series(name), color) for name, label, color in parts]
    note = "Of the batch, each completion with its own prompt."
    return _chart(runs, "tokens", title, note, data, layout)
