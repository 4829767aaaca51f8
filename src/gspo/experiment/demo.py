"""The demonstration: a Mixture-of-Experts model learns to sort, in about a minute."""

from __future__ import annotations

import json

from gspo.dev import TrainConfig
from gspo.experiment.spec import Spec
from gspo.train.checkpoint import steps_saved
from gspo.train.defaults import WARMUP

STEPS = 120


def demo_spec(path: str, steps: int = STEPS, seed: int = 0) -> Spec:
    """The spec of the demo: GSPO as in the paper; only the schedule is tuned."""
    number = 1
    while True:
        spec = Spec(
            name=f"sort-{number}",
            project="demo",
            path=path,
            task="sort",
            steps=steps,
            seed=seed,
            learning_rate=3e-4,
            train=TrainConfig(importance_sampling_level="sequence", lr_warmup_steps=WARMUP),
        )
        if not spec.folder.exists() or _unfinished(spec):
            return spec
        number += 1


def _unfinished(spec: Spec) -> bool:
    """Whether the folder holds the same demo, stopped half-way: then it goes on."""
    try:
        stored = json.loads((spec.folder / "spec.json").read_bytes())
    except (OSError, ValueError):
        return False
    done = max(steps_saved(spec.folder / "checkpoints"), default=0)
    return stored == spec.model_dump(mode="json") and done < spec.steps
