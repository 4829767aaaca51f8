"""Draw the study's pictures and fill the tables of docs/study.md, from docs/study/data/*.json.

    python docs/study/figures.py    # a few seconds; no model, no run

Parts without data are left as they are, and named.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from cells import Data, arms_of, done, named, stresses  # noqa: E402  # beside this file
from tables import filled, made, spread  # noqa: E402

from gspo.lab.statistics import t_interval  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#718096", "#b83280")
GREY = "#718096"


def main() -> None:
    """Fill and draw what there is data for."""
    parser = argparse.ArgumentParser(description="Draw the study's pictures, fill its tables.")
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--images", type=Path, default=HERE / "img")
    parser.add_argument("--page", type=Path, default=HERE.parent / "study.md")
    arguments = parser.parse_args()
    known = {path.stem: json.loads(path.read_text()) for path in arguments.data.glob("*.json")}
    arguments.page.write_text(filled(arguments.page.read_text(), made(known)))
    arguments.images.mkdir(exist_ok=True)
    for name, (part, draw) in PICTURES.items():
        if part not in known:
            print(f"{name}: no data yet; run: python docs/study/run.py {part[0]}")
            continue
        figure = draw(known[part])
        figure.savefig(arguments.images / f"{name}.png")
        print(arguments.images / f"{name}.png")


def stability(data: Data) -> Figure:
    """Held-out reward over steps, one panel a stress."""
    return _curves(data, "step")


def compute(data: Data) -> Figure:
    """Held-out reward over sampled tokens, one panel an arm."""
    figure = _figure(9, 3.6)
    arms = arms_of(data)
    axes = figure.subplots(1, len(arms), sharey=True, squeeze=False)[0]
    for axis, arm in zip(axes, arms, strict=True):
        for index, (stress, _) in enumerate(stresses(data)):
            _band(axis, done(data, arm, stress), "tokens", index, _text(stress))
        axis.set(title=named(arm), xlabel="sampled tokens")
        _plain(axis)
    axes[0].set_ylabel("held-out reward")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def clip_fractions(data: Data) -> Figure:
    """Clipped shares on a logarithmic scale, beside the paper's two numbers."""
    figure = _figure(7.5, 3.8)
    axis = figure.subplots()
    labels = []
    for at, (stress, _) in enumerate(stresses(data)):
        labels.append(_text(stress, "\n"))
        for index, arm in enumerate(("gspo", "grpo")):
            values = [c["means"]["ratio/clip_fraction_tokens"] for c in done(data, arm, stress)]
            label = named(arm) if at == 0 else None
            axis.plot([at] * len(values), values, "o", color=COLORS[index], alpha=0.7, label=label)
    for value, text in ((0.15, "GSPO in its paper"), (0.0013, "GRPO there")):
        axis.axhline(value, color=GREY, linestyle="--", linewidth=1)
        axis.text(len(labels) - 0.5, value, text, ha="right", va="bottom", color=GREY, fontsize=8)
    axis.set(
        yscale="log",
        ylabel="share of tokens clipped, mean over steps",
        xlim=(-0.5, len(labels) - 0.5),
    )
    axis.set_xticks(range(len(labels)), labels, fontsize=7)
    axis.legend(frameon=False, fontsize=8)
    _plain(axis)
    return figure


def ends(data: Data) -> Figure:
    """AUC: every seed as a dot, the mean with its 95 % interval."""
    return _dots(data, "auc", "mean held-out reward of the run (AUC)")


def replay(data: Data) -> Figure:
    """The same for the arms with and without replay, and how many experts an update changed."""
    figure = _figure(10, 3.8)
    left, right = figure.subplots(1, 2)
    _draw_dots(left, data, lambda cell: cell["auc"])
    left.set_ylabel("mean held-out reward of the run (AUC)")
    left.legend(frameon=False, fontsize=7, ncols=2)
    _draw_dots(right, data, lambda cell: cell["means"].get("moe/experts_changed", math.nan))
    right.set_ylabel("experts changed by a call of train, mean")
    return figure


def lengths(data: Data) -> Figure:
    """Spread of log-ratios against length: of tokens, of sequences, and of independent tokens."""
    figure = _figure(7.5, 4.2)
    axis = figure.subplots()
    for index, arm in enumerate(arms_of(data)):
        points = [(s, p) for s, _ in stresses(data) if (p := spread(data, arm, s)) is not None]
        fixed = sorted(p for s, p in points if s.get("length") != "free")
        color, name = COLORS[index], named(arm)
        x = [p[0] for p in fixed]
        axis.plot(x, [p[1] for p in fixed], "s:", color=color, label=f"{name}, $d_t$")
        axis.plot(x, [p[2] for p in fixed], "o-", color=color, label=rf"{name}, $\ell_i$")
        line = [p[1] / math.sqrt(p[0]) for p in fixed]
        axis.plot(x, line, "--", color=color, alpha=0.5, label=rf"{name}, $d_t/\sqrt{{L}}$")
        for stress, point in points:
            if stress.get("length") == "free":
                axis.plot(point[0], point[2], "^", color=color, label=rf"{name}, $\ell_i$, free")
    axis.set(xscale="log", yscale="log", xlabel="sampled tokens L", ylabel="root mean square")
    axis.legend(frameon=False, fontsize=8, ncols=2)
    _plain(axis)
    return figure


def _curves(data: Data, x: str) -> Figure:
    panels = list(stresses(data))
    columns = math.ceil(len(panels) / 2) if len(panels) > 3 else len(panels)
    rows = math.ceil(len(panels) / columns)
    figure = _figure(3.4 * columns, 2.8 * rows)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis, (stress, own) in zip(axes.T.flat, panels, strict=False):
        for index, arm in enumerate(own):
            _band(axis, done(data, arm, stress), x, index, named(arm))
        axis.set_title(_text(stress), fontsize=9)
        _plain(axis)
    for axis in axes[-1]:
        axis.set_xlabel(x)
    for axis in axes[:, 0]:
        axis.set_ylabel("held-out reward")
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure


def _band(axis: Axes, cells: list[Data], x: str, index: int, label: str) -> None:
    """Mean over seeds and its 95 % band; `x` is step or tokens."""
    if not cells:
        return
    curves = [cell["val/reward"] for cell in cells]
    at = [statistics.fmean(values) for values in zip(*(c[x] for c in curves), strict=True)]
    points = [t_interval(values) for values in zip(*(c["value"] for c in curves), strict=True)]
    axis.plot(at, [point.mean for point in points], color=COLORS[index], label=label)
    known = [p for p in points if p.low is not None and p.high is not None]
    if len(known) == len(points):
        low, high = [p.low or 0.0 for p in known], [p.high or 0.0 for p in known]
        axis.fill_between(at, low, high, color=COLORS[index], alpha=0.2, linewidth=0)


def _dots(data: Data, key: str, label: str) -> Figure:
    panels = list(stresses(data))
    figure = _figure(max(7.0, 1.1 * len(panels) + 2), 4)
    axis = figure.subplots()
    _draw_dots(axis, data, lambda cell: cell[key])
    axis.set_ylabel(label)
    axis.legend(frameon=False, fontsize=8)
    return figure


def _draw_dots(axis: Axes, data: Data, value: Callable[[Data], float]) -> None:
    panels = list(stresses(data))
    arms = arms_of(data)
    for index, arm in enumerate(arms):
        shift = (index - (len(arms) - 1) / 2) * min(0.25, 0.8 / len(arms))
        for at, (stress, _) in enumerate(panels):
            values = [value(cell) for cell in done(data, arm, stress)]
            if not values:
                continue
            interval = t_interval(values)
            label = named(arm) if at == 0 else None
            color: dict[str, Any] = {"color": COLORS[index]}
            axis.plot([at + shift] * len(values), values, ".", alpha=0.35, **color)
            axis.plot([at + shift], [interval.mean], "o", label=label, **color)
            if interval.low is not None and interval.high is not None:
                axis.plot([at + shift] * 2, [interval.low, interval.high], **color)
    labels = [_text(stress, "\n") for stress, _ in panels]
    axis.set_xticks(range(len(panels)), labels, fontsize=8)
    _plain(axis)


def _text(stress: dict[str, Any], between: str = ", ") -> str:
    return between.join(
        f"{axis} {value:g}" if isinstance(value, int | float) else str(value)
        for axis, value in stress.items()
    )


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def _plain(axis: Axes) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


PICTURES: dict[str, tuple[str, Callable[[Data], Figure]]] = {
    "stability": ("a-stability", stability),
    "clip-fractions": ("a-stability", clip_fractions),
    "replay": ("c-replay", replay),
    "precision": ("d-precision", ends),
    "length": ("e-length", lengths),
    "length-reward": ("e-length", ends),
    "compute": ("f-compute", compute),
    "epsilon": ("g-epsilon", ends),
}
"""Name of the picture -> the part's data, and how it is drawn."""

if __name__ == "__main__":
    main()
