"""The two computed figures of the documentation: no model, no run, a few seconds.

    python benchmarks/figures.py    # writes docs/img/{correction-collapse,epsilon-length}.png

`correction-collapse.png`: what a correction of pi_old/mu weighs a sequence of L tokens with, where
c_t is normal with a constant bias and spread. Sums of normals are normal: the bands are exact.
`epsilon-length.png`: the share of sequences with A > 0 or A < 0 (half each) that a clip range cuts,
where l_i is normal with mean 0 and spread sigma/sqrt(L).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BIAS, NOISE = -0.002, 0.02
EPSILON_LOW, EPSILON_HIGH = 3e-4, 4e-4
SIGMAS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SCALED_LENGTH = 4096
"""Where the sqrt-scaled band is as wide as the fixed one."""
LENGTHS = [2 ** (k / 4) for k in range(4 * 4, 17 * 4 + 1)]
IMAGES = Path(__file__).parent.parent / "docs" / "img"
BLUE, ORANGE, GREY = "#2b6cb0", "#c05621", "#718096"
SHADES = ("#a3bffa", "#7f9cf5", "#5a67d8", "#434190", "#1a202c")


def clipped(length: float, sigma: float, *, scaled: bool = False) -> float:
    """Share of the sequences with an advantage that noise of spread sigma a token clips.

    >>> round(clipped(100, 0.001), 4)  # noise of 1e-4 a sequence, a band of 3e-4 / 4e-4
    0.0007
    >>> [round(clipped(n, 0.02, scaled=True), 2) for n in (256, 65_536)]
    [0.13, 0.13]
    """
    scale = math.sqrt(SCALED_LENGTH / length) if scaled else 1.0
    low, high = EPSILON_LOW * scale, EPSILON_HIGH * scale
    spread = NormalDist(0.0, sigma / math.sqrt(length))
    below = spread.cdf(math.log1p(-low)) if low < 1 else 0.0
    return (below + 1 - spread.cdf(math.log1p(high))) / 2


def main() -> None:
    """Draw both."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained", dpi=110)
    draw_collapse(figure.subplots())
    figure.savefig(IMAGES / "correction-collapse.png")
    figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2, sharey=True)
    draw_clipped(left, scaled=False)
    draw_clipped(right, scaled=True)
    left.set_ylabel("share clipped by noise alone")
    figure.savefig(IMAGES / "epsilon-length.png")


def draw_collapse(axis: Axes) -> None:
    """Weights against length: the product of the tokens' ratios, and their geometric mean."""
    product = [_quantiles(BIAS * n, NOISE * math.sqrt(n)) for n in LENGTHS]
    mean = [_quantiles(BIAS, NOISE / math.sqrt(n)) for n in LENGTHS]
    _band(axis, product, ORANGE, "sequence_product: exp(sum of c)")
    _band(axis, mean, BLUE, "sequence_geometric: exp(mean of c)")
    axis.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
    axis.text(LENGTHS[-1], 0.5, "0.5, product mask's lower bound", ha="right", va="top", color=GREY)
    axis.set(xscale="log", yscale="log", ylim=(1e-12, 30), xlim=(LENGTHS[0], LENGTHS[-1]))
    axis.set(xlabel="sampled tokens L", ylabel="weight of the sequence")
    axis.set_title(f"median and 5 % to 95 %; c: mean {BIAS}, spread {NOISE} per token")
    axis.legend(frameon=False, loc="lower left")
    _plain(axis)


def draw_clipped(axis: Axes, *, scaled: bool) -> None:
    """Clipped share against length, one line a sigma."""
    for sigma, color in zip(SIGMAS, SHADES, strict=True):
        shares = [clipped(n, sigma, scaled=scaled) for n in LENGTHS]
        axis.plot(LENGTHS, shares, color=color, label=f"sigma = {sigma:g}")
    axis.set(xscale="log", ylim=(0, 0.52), xlim=(LENGTHS[0], LENGTHS[-1]))
    axis.set(xlabel="sampled tokens L")
    fixed = f"fixed band {EPSILON_LOW:g} / {EPSILON_HIGH:g}"
    axis.set_title(
        f'epsilon_scale="sqrt_length", equal at L = {SCALED_LENGTH}' if scaled else fixed
    )
    if scaled:
        axis.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.75), fontsize=9)
    _plain(axis)


def _quantiles(mean: float, spread: float) -> tuple[float, float, float]:
    normal = NormalDist(mean, spread)
    low, middle, high = (math.exp(normal.inv_cdf(q)) for q in (0.05, 0.5, 0.95))
    return low, middle, high


def _band(axis: Axes, values: Sequence[tuple[float, float, float]], color: str, label: str) -> None:
    low, middle, high = zip(*values, strict=True)
    axis.fill_between(LENGTHS, low, high, color=color, alpha=0.2, linewidth=0)
    axis.plot(LENGTHS, middle, color=color, label=label)


def _plain(axis: Axes) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
