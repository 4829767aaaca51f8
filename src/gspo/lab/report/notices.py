"""What a run's own numbers show to be wrong, by the chart that shows it."""

from __future__ import annotations

from gspo.lab.report.data import RunData
from gspo.train.epsilon import noise_advice

_NORMAL_98 = 4.653
"""From the 1 % to the 99 % quantile of a normal distribution, in standard deviations."""


def notices(run: RunData) -> dict[str, list[str]]:
    """Chart id -> warnings, worst first."""
    found = {
        "reward": [_skipped(run), _total(run, "train/exceptions", "rollouts failed"), _long(run)],
        "clip": [_clip(run)],
        "ratios": [
            _total(run, "ratio/extreme", "sequences had ratios beyond what float32 can weigh")
        ],
    }
    return {id: [text for text in texts if text] for id, texts in found.items()}


def _clip(run: RunData) -> str:
    """The trainer's own advice, with the spread estimated from the quantiles that are logged."""
    settings = run.settings
    target, by_engine, by_length = 0.15, True, False
    if settings is not None:
        if settings.auto_epsilon or not settings.objective.has_range:
            return ""
        target = settings.epsilon_target
        by_engine = settings.old_logprobs == "rollout"
        by_length = settings.objective.epsilon_scale == "sqrt_length"
    if not run.by_sequence:
        return ""
    steps, last = 0, ""
    for record in run.records:
        if "ratio/epsilon_low" not in record or "ratio/log_p99" not in record:
            continue
        noise = record.get("mismatch/clip_fraction", 0.0) if by_engine else 0.0
        spread = (record["ratio/log_p99"] - record["ratio/log_p01"]) / _NORMAL_98
        advice = noise_advice(
            noise, 0.0 if by_length else spread, record["ratio/epsilon_low"], target
        )
        steps += advice is not None
        last = advice or last
    return f"On {steps} of {run.steps} steps; on the last of these, {last}." if last else ""


def _skipped(run: RunData) -> str:
    skipped = len(run.values("train/skipped"))
    return f"{skipped} of {run.steps} steps made no update." if skipped else ""


def _long(run: RunData) -> str:
    return _total(
        run, "train/trajectories_too_long", "trajectories were longer than the context and left out"
    )


def _total(run: RunData, key: str, what: str) -> str:
    total = sum(run.values(key))
    return f"{total:,.0f} {what}." if total else ""
