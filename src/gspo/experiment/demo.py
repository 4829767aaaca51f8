"""The demonstration: a Mixture-of-Experts model learns to sort, in about a minute."""

from __future__ import annotations

import itertools
import json
from contextlib import suppress

from gspo.dev import TrainConfig
from gspo.experiment.spec import Spec
from gspo.train.checkpoint import steps_saved
from gspo.train.defaults import WARMUP

STEPS = 120


def demo_spec(path: str, steps: int = STEPS, seed: int = 0) -> Spec:
    """The spec of the demo: GSPO as in the paper; only the schedule is tuned."""
    spec = Spec(
        project="demo",
        path=path,
        task="sort",
        steps=steps,
        seed=seed,
        learning_rate=3e-4,
        train=TrainConfig(importance_sampling_level="sequence", lr_warmup_steps=WARMUP),
    )
    named = (spec.model_copy(update={"name": f"sort-{number}"}) for number in itertools.count(1))
    return next(spec for spec in named if not spec.folder.exists() or _unfinished(spec))


def _unfinished(spec: Spec) -> bool:
    """Whether the folder holds the same demo, stopped half-way, which is then continued."""
    with suppress(OSError, ValueError):
        stored = json.loads((spec.folder / "spec.json").read_bytes())
        done = max(steps_saved(spec.folder / "checkpoints"), default=0)
        return stored == spec.model_dump(mode="json") and done < spec.steps
    return False
