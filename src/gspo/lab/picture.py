"""A run as a picture: reward, clip fraction, entropy and log-ratio quantiles over steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspo.backend.metrics_file import read_metrics
from gspo.core.errors import MissingDependencyError, RunError
from gspo.core.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREY = "#2b6cb0", "#c05621", "#718096"
Record = dict[str, float]


def require_plotting() -> None:
    """Raise `MissingDependencyError` before any work is done, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingDependencyError("matplotlib", "lab", "the picture of a run") from None


def draw_run(folder: Path) -> Path:
    """Write `<folder>/run.png` from `<folder>/metrics.jsonl`.

    Raises:
        RunError: the folder holds no metrics.
        MissingDependencyError: matplotlib is not installed.
    """
    require_plotting()
    from matplotlib.figure import Figure

    path = folder / "metrics.jsonl"
    if not path.exists():
        raise RunError(f"{folder} has no metrics.jsonl: it is not the folder of a run")
    records = read_metrics(path)
    figure = Figure(figsize=(11, 6.5), layout="constrained", dpi=110)
    axes = figure.subplots(2, 2)
    _reward(axes[0][0], records)
    _clip(axes[0][1], records)
    _entropy(axes[1][0], records)
    _quantiles(axes[1][1], records)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("/".join(folder.parts[-2:]))
    out = folder / "run.png"
    with replacing(out) as building:
        figure.savefig(building, format="png")
    return out


def _series(records: list[Record], key: str) -> tuple[list[float], list[float]]:
    chosen = [(record["step"], record[key]) for record in records if key in record]
    return [step for step, _ in chosen], [value for _, value in chosen]


def _reward(axis: Axes, records: list[Record]) -> None:
    steps, rewards = _series(records, "train/reward")
    axis.plot(steps, rewards, color=_BLUE, alpha=0.35, lw=1, label="train, one batch")
    axis.plot(steps, _smoothed(rewards), color=_BLUE, lw=2, label="train, mean of 9")
    measured = [record for record in records if "val/reward" in record]
    if measured:
        mean = [record["val/reward"] for record in measured]
        low = [m - r.get("val/reward_low", m) for m, r in zip(mean, measured, strict=True)]
        high = [r.get("val/reward_high", m) - m for m, r in zip(mean, measured, strict=True)]
        at = [record["step"] for record in measured]
        style: dict[str, Any] = {"fmt": "o", "color": _ORANGE, "capsize": 4, "zorder": 5}
        axis.errorbar(at, mean, yerr=[low, high], label="held-out, 95 % interval", **style)
    axis.set_title("reward")
    axis.legend(frameon=False, fontsize=8)


def _clip(axis: Axes, records: list[Record]) -> None:
    for key, label, color in (
        ("ratio/clip_fraction", "all sequences", _BLUE),
        ("ratio/clip_fraction_positive", "advantage > 0", _ORANGE),
        ("ratio/clip_fraction_negative", "advantage < 0", _GREY),
    ):
        steps, values = _series(records, key)
        axis.plot(steps, _smoothed(values), color=color, label=label)
    axis.set_ylim(0, 1)
    axis.set_title("clip fraction (sequences, mean of 9 steps)")
    axis.legend(frameon=False, fontsize=8)


def _entropy(axis: Axes, records: list[Record]) -> None:
    axis.plot(*_series(records, "loss/entropy"), color=_BLUE)
    axis.set_ylim(bottom=0)
    axis.set_title("entropy per token (nats)")


def _quantiles(axis: Axes, records: list[Record]) -> None:
    steps, low = _series(records, "ratio/log_p01")
    _, high = _series(records, "ratio/log_p99")
    axis.fill_between(steps, low, high, color=_BLUE, alpha=0.2, label="1 % to 99 %")
    axis.plot(*_series(records, "ratio/log_p50"), color=_BLUE, label="median")
    axis.axhline(0, color=_GREY, lw=0.8)
    axis.set_title("log-ratio of sequences, $l_i$")
    axis.legend(frameon=False, fontsize=8)


def _smoothed(values: list[float], width: int = 9) -> list[float]:
    """Centred moving mean; shorter at the ends."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
