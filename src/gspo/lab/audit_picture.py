"""An audit as a picture: l_i against the clip band, and its spread against length."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gspo.core.files import explained, replacing
from gspo.lab.audit_report import AuditReport, clip_band
from gspo.lab.picture import require_plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREY, _GREEN = "#2b6cb0", "#c05621", "#718096", "#2f855a"


def draw_audit(report: AuditReport, log_ratios: np.ndarray, path: Path) -> Path:
    """Write the picture of an audit; `log_ratios` are the sequences' l_i.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_plotting()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2)
    _histogram(left, report, log_ratios)
    _spread(right, report)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report.model}, sampled in {report.rollout_dtype}: {report.verdict}")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as building:
        figure.savefig(building, format=path.suffix[1:] or "png")
    return path


def _histogram(axis: Axes, report: AuditReport, log_ratios: np.ndarray) -> None:
    low, high = clip_band(report.epsilon_low, report.epsilon_high)
    outer = np.quantile(log_ratios, (0.02, 0.98))
    edges = min(outer[0], max(low, -1.0)), max(outer[1], high)
    margin = 0.1 * (edges[1] - edges[0])
    left, right = edges[0] - margin, edges[1] + margin
    axis.hist(np.clip(log_ratios, left, right), bins=60, range=(left, right), color=_BLUE)
    axis.axvspan(max(low, left), high, color=_GREEN, alpha=0.25, label="not clipped")
    axis.axvline(
        report.total.sequence_log_ratio.mean, color=_ORANGE, lw=1.5, label="mean: the bias"
    )
    axis.set_xlim(left, right)
    axis.locator_params(axis="x", nbins=7)
    axis.ticklabel_format(axis="x", scilimits=(-2, 2))
    axis.set_xlabel("$l_i$ on unchanged weights")
    axis.set_ylabel("sequences")
    shares = report.total.clipped_positive, report.total.clipped_negative
    axis.set_title(f"noise clips {shares[0]:.0%} of $A>0$, {shares[1]:.0%} of $A<0$")
    axis.legend(frameon=False, fontsize=8)


def _spread(axis: Axes, report: AuditReport) -> None:
    """Log-log, where 1/sqrt(L) is a straight line."""
    blocks = [block for block in report.blocks if block.blocks > 1 and block.std > 0]
    lengths = [block.tokens for block in blocks]
    style = {"color": _BLUE, "marker": "o", "ms": 4}
    axis.plot(lengths, [block.std for block in blocks], label="spread, blocks of L", **style)
    whole = [b for b in report.buckets if b.sequences > 1 and b.sequence_log_ratio.std > 0]
    at, spread = [b.mean_length for b in whole], [b.sequence_log_ratio.std for b in whole]
    axis.scatter(at, spread, color=_ORANGE, zorder=5, label="spread, whole sequences")
    ends = np.array([1.0, max([1.5, *lengths, *at])])
    if report.total.token_log_ratio.std > 0:
        ideal = report.total.token_log_ratio.std / np.sqrt(ends)
        axis.plot(ends, ideal, color=_GREY, ls="--", label=r"$\sigma(d_t)/\sqrt{L}$")
    if report.total.token_log_ratio.mean != 0:
        bias = abs(report.total.token_log_ratio.mean)
        axis.plot(ends, [bias, bias], color=_ORANGE, lw=1.2, label="bias, |mean of $d_t$|")
    epsilon = report.epsilon_low
    axis.plot(ends, [epsilon, epsilon], color=_GREEN, lw=1.2, label=r"$\varepsilon_{low}$")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_ylim(top=4 * axis.get_ylim()[1])  # room for the legend
    axis.set_xlabel("sampled tokens L")
    axis.set_title("spread and bias against length")
    axis.legend(frameon=False, fontsize=8)
