"""Keep what a comparison found: clips.json, its picture, and the lines of a table.

    python examples/textworld/curves.py .gspo/compare/clips

The picture shows held-out and training reward: a thin line for each seed, a thick one for their
mean. A cell is one line of clips.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PICTURE = HERE.parents[1] / "docs/img/clips-textworld.png"
KEPT = {
    "val": "val/reward",
    "train": "train/reward",
    "entropy": "loss/entropy",
    "clip": "ratio/clip_fraction",
    "logmax": "ratio/log_abs_max",
    "grad": "optim/grad_norm",
}


def row(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell, and each of its curves as pairs of step and value."""
    told = {name: cell[name] for name in ("arm", "stress", "seed", "status", "collapsed")}
    for name, metric in KEPT.items():
        curve = cell["curves"].get(metric, {"step": [], "value": []})
        pairs = zip(curve["step"], curve["value"], strict=True)
        told[name] = [[step, None if v is None else round(v, 4)] for step, v in pairs]
    return told


def draw(rows: list[dict[str, Any]]) -> None:
    """Held-out reward above, training reward below, an arm in each column."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    figure, axes = plt.subplots(
        2, len(arms), figsize=(2.6 * len(arms), 4.6), sharex=True, sharey="row", squeeze=False
    )
    for column, arm in enumerate(arms):
        cells = [row for row in rows if row["arm"] == arm]
        for axis, name in zip(axes[:, column], ("val", "train"), strict=True):
            for cell in cells:
                axis.plot(*zip(*cell[name], strict=True), color="C0", alpha=0.35, linewidth=1)
            steps = [step for step, _ in cells[0][name]]
            means = [fmean(dict(cell[name])[step] for cell in cells) for step in steps]
            axis.plot(steps, means, color="C0", linewidth=2.5)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0, column].set_title(arm)
        axes[1, column].set_xlabel("step")
    axes[0, 0].set_ylabel("held-out reward")
    axes[1, 0].set_ylabel("training reward")
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)


def main(folder: Path) -> None:
    found = json.loads((folder / "comparison.json").read_text())
    rows = [row(cell) for cell in found["cells"] if cell["status"] == "done"]
    text = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    (HERE / "clips.json").write_text(f"[{text}]\n")
    draw(rows)
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = [row for row in rows if row["arm"] == arm]
        for step in (step for step, _ in cells[0]["val"]):
            rewards = [dict(cell["val"])[step] for cell in cells]
            told = ", ".join(f"{reward:.2f}" for reward in rewards)
            print(f"{arm} step {step}: {told}; mean {fmean(rewards):.2f}")
    for pair in found["paired"]:
        interval = f"[{pair['low']:+.2f}, {pair['high']:+.2f}]"
        told = f"{pair['difference']:+.2f} {interval}, n = {pair['n']}: {pair['verdict']}"
        print(f"{pair['metric']}: {pair['a']} - {pair['b']} {told}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
