"""Draw the held-out reward of runs, and say what training added.

    python examples/environments/curve.py .gspo/environments/guess .gspo/environments/coins

Each run is measured before its warm start (step 0), after it (step 1), and while it trains. The
difference between step 1 and the last is over instances of the environment, each with itself.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import pyarrow.parquet as parquet

matplotlib.use("svg")
import matplotlib.pyplot as plt

from gspo.lab.statistics import paired_difference

OUT = Path(__file__).parents[2] / "docs/img/environments.svg"


def measured(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have a held-out reward."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "val/reward" in line]


def by_instance(run: Path, step: int) -> dict[str, float]:
    """The mean held-out reward of each instance at a step."""
    rewards: dict[str, list[float]] = defaultdict(list)
    table = parquet.read_table(run / f"trajectories/val/{step:04}.parquet")
    for row in table.select(["metadata", "reward"]).to_pylist():
        said = json.loads(row["metadata"])
        rewards[str(said["instance"] or said["seed"])].append(row["reward"])
    return {name: fmean(values) for name, values in rewards.items()}


def added(run: Path) -> str:
    """What the steps after the warm start added, with a 95 % interval."""
    steps = [line["step"] for line in measured(run) if line["step"] > 0]
    first, last = by_instance(run, steps[0]), by_instance(run, steps[-1])
    both = sorted(first.keys() & last.keys())
    return f"{paired_difference([last[i] for i in both], [first[i] for i in both])} ({len(both)})"


def main(runs: list[Path]) -> None:
    rows, columns = -(-len(runs) // 3), min(len(runs), 3)
    size = (3.1 * columns, 2.6 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(runs) :]:
        axis.axis("off")
    for axis, run in zip(axes.flat, runs, strict=False):
        lines = [line for line in measured(run) if line["step"] > 0]
        steps = [line["step"] for line in lines]
        low, high = ([line[f"val/reward_{end}"] for line in lines] for end in ("low", "high"))
        axis.fill_between(steps, low, high, alpha=0.2, linewidth=0)
        axis.plot(steps, [line["val/reward"] for line in lines], marker="o")
        axis.set(title=run.name, xlabel="step (1: after the warm start)")
        axis.spines[["top", "right"]].set_visible(False)
        for line in measured(run):
            ends = [
                f"{line[f'val/reward_{end}']:.3f}"
                for end in ("low", "high")
                if f"val/reward_{end}" in line
            ]
            print(f"{run.name} step {line['step']}: {line['val/reward']:.3f} [{', '.join(ends)}]")
        print(f"{run.name}: {added(run)}")
    for row in axes:
        row[0].set_ylabel("held-out reward")
    figure.tight_layout()
    figure.savefig(OUT, metadata={"Date": None})


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
