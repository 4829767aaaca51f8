"""What the examples print: a line a step, and the totals as JSON at the end."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from typing import Any


def print_step(step: int, metrics: Mapping[str, float]) -> None:
    """One line of the numbers to watch."""
    numbers = {
        "reward": metrics["train/reward"],
        "clipped": metrics.get("ratio/clip_fraction", 0.0),
        "flat groups": metrics["train/groups_zero_advantage"],
        "entropy": metrics.get("loss/entropy", 0.0),
        "tokens": metrics["tokens/completion_mean"],
    }
    text = "  ".join(f"{name} {value:.3g}" for name, value in numbers.items())
    seconds = (
        f"{metrics['time/step']:.1f} s = rollout {metrics['time/rollout']:.1f}"
        f" + train {metrics['time/train']:.1f} + checkpoint {metrics['time/checkpoint']:.1f}"
    )
    print(f"step {step:3d}  {text}  {seconds}", flush=True)


def print_totals(records: list[dict[str, float]], **totals: Any) -> None:
    """The last line: totals over the steps of a run, however often it was resumed, as JSON."""
    steps = [record for record in records if "time/step" in record]

    def mean(name: str) -> float:
        values = [record[name] for record in steps if name in record]
        return round(sum(values) / max(1, len(values)), 4)

    totals |= {
        "steps": len(steps),
        "first_train_reward": steps[0]["train/reward"],
        "last_train_reward": steps[-1]["train/reward"],
        "mean_clip_fraction": mean("ratio/clip_fraction"),
        "mean_seconds_per_step": mean("time/step"),
        "peak_memory_gib": round(peak_memory_gib(), 2),
    }
    print(json.dumps(totals), flush=True)


def peak_memory_gib() -> float:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
