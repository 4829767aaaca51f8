"""epsilon="auto": the clip range that clips a target share of the sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gspo.core.log import log
from gspo.core.metrics import Metrics
from gspo.objective import MAX_LOG_RATIO, Objective
from gspo.train.observe import Observer, Trace
from gspo.train.settings import Settings

LOWEST, HIGHEST = 1e-6, 1.0
RATE = 0.3


@dataclass
class EpsilonController:
    """Steers epsilon_low, from one call of `train` to the next; epsilon_high keeps its proportion.

    Each sequence has a smallest epsilon that would leave it unclipped. The (1 - target) quantile
    of those is the range that clips just the target share, whatever the range was: so the
    controller converges from anywhere. It moves a share `RATE` of the way, in logarithms, and
    keeps both sides of the range in [LOWEST, HIGHEST].

    Attributes:
        epsilon_low: None before the first call: the preset's.
    """

    epsilon_low: float | None = None
    _warned: bool = False

    def apply(self, objective: Objective) -> Objective:
        """The objective with the present range."""
        if self.epsilon_low is None:
            return objective
        scale = objective.epsilon_high / objective.epsilon_low
        return objective.with_epsilon(self.epsilon_low, self.epsilon_low * scale)

    def observe(self, objective: Objective, traces: Sequence[Trace], target: float) -> None:
        """Move the range towards the target, by the sequences of one call under `objective`."""
        can_clip = [t for t in traces if t.advantage != 0 and not math.isnan(t.log_ratio)]
        needed = sorted(needed_epsilon(objective, trace) for trace in can_clip)
        wanted = needed[min(int((1 - target) * len(needed)), len(needed) - 1)] if needed else 0.0
        if wanted == 0:  # nothing moved at all: no reason to close the range
            return
        scale = objective.epsilon_high / objective.epsilon_low
        wanted, present = _bounded(wanted, scale), objective.epsilon_low
        moved = math.log(present) + RATE * (math.log(wanted) - math.log(present))
        self.epsilon_low = _bounded(math.exp(moved), scale)

    def learn(self, settings: Settings, observer: Observer, step: int) -> None:
        """After a call: steer the range if that is asked for; else warn once if noise clips."""
        if settings.epsilon == "auto":
            self.observe(settings.objective, observer.traces, settings.epsilon_target)
        elif not self._warned and (warning := noise_warning(settings, observer.metrics)):
            self._warned = True
            log.warning("train step %d: %s", step, warning)


def needed_epsilon(objective: Objective, trace: Trace) -> float:
    """The smallest epsilon_low at which the sequence is not clipped."""
    distance = math.expm1(min(trace.log_ratio, MAX_LOG_RATIO))
    scale = objective.epsilon_high / objective.epsilon_low
    distance = distance / scale if trace.advantage > 0 else -distance
    if objective.epsilon_scale == "sqrt_length":  # what `clip_range` compares with epsilon itself
        distance *= math.sqrt(max(trace.length, 1.0))
    return max(distance, 0.0)


def noise_warning(settings: Settings, metrics: Metrics) -> str | None:
    """What to change if noise by itself clips more than half of `epsilon_target`; else None."""
    noise = metrics.compute().get("mismatch/clip_fraction", 0.0)  # with a sequence-level range only
    # With pi_old of the trainer the ratio is not taken against the engine.
    if settings.old_logprobs == "trainer" or noise <= settings.epsilon_target / 2:
        return None
    return (
        f"engine and trainer differ so much that noise alone clips {noise:.0%} of the sequences on "
        f"unchanged weights (epsilon {settings.objective.epsilon_low:.2g}): raise epsilon, set "
        "epsilon='auto' or old_logprobs='trainer', or roll out in a finer dtype"
    )


def _bounded(epsilon: float, scale: float) -> float:
    """epsilon_low such that both sides of the range lie within the bounds."""
    return min(max(epsilon, LOWEST), HIGHEST / max(1.0, scale))
