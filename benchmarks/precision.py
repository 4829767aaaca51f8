"""Does GSPO tolerate a rollout engine of another precision? Three arms, int4 rollouts.

    python benchmarks/precision.py            # 3 seeds, about 10 minutes on two cores

The embedded sort model samples from int4 weights, the trainer computes in float32, and the
engine's log-probs are used directly (old_logprobs="rollout"). Arms: GRPO; GSPO at the paper's
range; GSPO with epsilon="auto". Float32 rollouts stand beside as the control. Same prompts and
same starting weights in every arm of a seed. Writes benchmarks/results/precision.json and prints
the table, whatever it shows.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

STEPS, SEEDS, LEARNING_RATE = 60, (0, 1, 2), 3e-4
ARMS: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": "grpo"},
    "gspo, 3e-4/4e-4": {"algorithm": "gspo"},
    "gspo, auto": {"algorithm": "gspo", "epsilon": "auto"},
}
AVERAGED = {
    "clip_fraction": "ratio/clip_fraction",
    "noise_clip_fraction": "mismatch/clip_fraction",
    "noise_clip_positive": "mismatch/clip_fraction_positive",
    "noise_clip_negative": "mismatch/clip_fraction_negative",
    "noise_mean": "mismatch/log_ratio_mean",
}


class _Quiet:
    def started(self, spec: Any, step: int, notes: list[str]) -> None: ...
    def stepped(self, step: int, metrics: dict[str, float]) -> None: ...
    def evaluated(self, step: int, estimate: Any) -> None: ...


def run(cell: tuple[str, int, str]) -> dict[str, Any]:
    """One arm with one seed: held-out reward before and after, and what was clipped."""
    arm, seed, dtype = cell
    from gspo.dev import InternalModelConfig, TrainConfig
    from gspo.experiment.loop import run_experiment
    from gspo.experiment.spec import Spec

    with tempfile.TemporaryDirectory() as path:
        spec = Spec(
            task="sort",
            path=path,
            steps=STEPS,
            seed=seed,
            learning_rate=LEARNING_RATE,
            keep_checkpoints=1,
            train=TrainConfig(lr_warmup_steps=5, seed=seed, **ARMS[arm]),
            load=InternalModelConfig(rollout_dtype=dtype, threads=1),  # pyright: ignore[reportArgumentType]
        )
        outcome = asyncio.run(run_experiment(spec, _Quiet()))
        lines = (outcome.run / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert outcome.before is not None and outcome.after is not None
    row = {"arm": arm, "seed": seed, "rollout_dtype": dtype}
    row |= {"before": outcome.before.mean, "after": outcome.after.mean}
    for name, key in AVERAGED.items():
        values = [s[key] for s in steps if key in s]
        row[name] = sum(values) / len(values) if values else None
    return row | {"epsilon_last": steps[-1].get("ratio/epsilon_low")}


def main() -> None:
    """Run all cells, two at a time with one thread each; print and write the table."""
    os.environ["OMP_NUM_THREADS"] = "1"
    cells = [(arm, seed, d) for d in ("int4", "float32") for arm in ARMS for seed in SEEDS]
    with multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1)) as pool:
        rows = pool.map(run, cells, chunksize=1)
    import torch
    import transformers

    result = {
        "name": "precision",
        "task": f"embedded:sort, {STEPS} steps of 32 x 16, learning rate {LEARNING_RATE}",
        "rows": rows,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "command": "python benchmarks/precision.py",
    }
    path = Path(__file__).parent / "results" / "precision.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for dtype in ("int4", "float32"):
        for arm in ARMS:
            _print([r for r in rows if r["arm"] == arm and r["rollout_dtype"] == dtype])


def _print(rows: list[dict[str, Any]]) -> None:
    def mean(name: str) -> float:
        return sum(row[name] for row in rows) / len(rows)

    noise = "-, its range is per token"
    if rows[0]["noise_clip_fraction"] is not None:
        noise = (
            f"{mean('noise_clip_fraction'):.0%} (A>0 {mean('noise_clip_positive'):.0%}, "
            f"A<0 {mean('noise_clip_negative'):.0%})"
        )
    after = "/".join(f"{row['after']:.2f}" for row in rows)
    print(
        f"{rows[0]['rollout_dtype']:8} {rows[0]['arm']:16} before {mean('before'):.2f}  "
        f"after {after}  clipped {mean('clip_fraction'):.0%}  "
        f"by noise alone {noise}  epsilon at the end {mean('epsilon_last'):.2g}"
    )


if __name__ == "__main__":
    main()
