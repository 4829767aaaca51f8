"""Steps of the demonstration, on the device and on the CPU: the whole loop, and its rewards.

The same seed draws the same problems and random numbers. Both sides sample in float32, so that
the first rewards are equal; a token that falls on the other side of a threshold for a rounding
makes the later ones differ a little.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import tempfile
import time
from typing import Any

from gpu_parts.bench import Bench
from gspo.dev import InternalModelConfig
from gspo.experiment.heldout import Estimate
from gspo.experiment.loop import run_experiment
from gspo.experiment.spec import Spec
from gspo.experiment.whole_run import demo_spec
from gspo.policy.embedded import embedded_folder

STEPS = 20
NEAR = 0.1
"""By how much the mean rewards of the last five steps may differ."""


def measure(bench: Bench) -> None:
    """The device first: if it is not there in time, the CPU's part is left out."""
    steps = bench.size(STEPS, 2)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with bench.row("warm start of embedded:sort, on the CPU") as row:
        row |= bench.time(lambda: embedded_folder("embedded:sort"), repeats=1, warmup=0)
    rewards: dict[str, list[float]] = {}
    for device in (bench.card.device, "cpu"):
        name = "on the CPU" if device == "cpu" and rewards else "on the device"
        with bench.row(f"{steps} steps {name}") as row:
            seen = Watch()
            with tempfile.TemporaryDirectory() as folder:
                asyncio.run(run_experiment(_spec(bench, folder, steps, device), seen))
            rewards[name] = seen.rewards
            row |= {"device": device, "rewards": seen.rewards, "last": seen.rewards[-1]}
            row |= {"seconds_of_a_step": statistics.median(seen.seconds[1:] or seen.seconds)}
    with bench.row("rewards beside each other") as row:
        pairs = list(zip(*rewards.values(), strict=True))
        assert len(rewards) == 2, "one side is missing"
        late = [statistics.mean(own[-5:]) for own in rewards.values()]
        row["first_gap"] = abs(pairs[0][0] - pairs[0][1])
        row["late_gap"] = abs(late[0] - late[1])
        row["ok"] = row["late_gap"] <= NEAR


class Watch:
    """Keeps the reward of each step, and its seconds."""

    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.seconds: list[float] = []
        self._since = time.perf_counter()

    def started(self, spec: Spec, step: int, notes: list[str]) -> None:
        self._since = time.perf_counter()

    def stepped(self, step: int, metrics: dict[str, float]) -> None:
        now = time.perf_counter()
        self.rewards.append(metrics["train/reward"])
        self.seconds.append(now - self._since)
        self._since = now

    def evaluated(self, step: int, estimate: Estimate) -> None:
        pass


def _spec(bench: Bench, folder: str, steps: int, device: str) -> Spec:
    sizes: dict[str, Any] = bench.size({}, {"prompts": 4, "completions": 4})
    changes = {"eval_prompts": 0, "load": InternalModelConfig(device=device), **sizes}
    return demo_spec(folder, steps).model_copy(update=changes)
