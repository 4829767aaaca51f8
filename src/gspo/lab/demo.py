"""The demonstration: a Mixture-of-Experts model learns to sort, in about a minute."""

from __future__ import annotations

from pathlib import Path

from gspo.dev import TrainConfig
from gspo.lab.spec import Spec

STEPS = 120


def demo_spec(path: str, steps: int = STEPS, seed: int = 0) -> Spec:
    """GSPO as in the paper on the embedded model; the schedule is all that is tuned."""
    return Spec(
        name=_free_name(Path(path) / "demo", steps),
        project="demo",
        path=path,
        task="sort",
        steps=steps,
        seed=seed,
        learning_rate=3e-4,
        train=TrainConfig(importance_sampling_level="sequence", lr_warmup_steps=5),
    )


def _free_name(folder: Path, steps: int) -> str:
    """The first of sort-1, sort-2, ... that is not a finished run: a killed one goes on."""
    number = 1
    while (folder / f"sort-{number}" / "checkpoints" / f"{steps:04d}").exists():
        number += 1
    return f"sort-{number}"
