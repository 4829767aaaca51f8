"""The report of one run, or of several side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gspo.lab.report.charts import sections
from gspo.lab.report.data import RunData, changed, flat
from gspo.lab.report.page import Live, render
from gspo.lab.report.trajectories import (
    COMPLETIONS,
    GROUPS,
    LONGEST,
    TOKENS,
    sampled_trajectories,
)
from gspo.objective import PRESETS


def run_page(runs: Sequence[RunData], live: Live | None = None) -> str:
    """The page; `live` where it will be written again."""
    found = sections(runs)
    stored = [sampled_trajectories(run, TOKENS // len(runs)) for run in runs]
    trajectories = [one for one in stored if one]
    return render(
        "run.html",
        ", ".join(run.label for run in runs),
        [chart for _, charts in found for chart in charts],
        trajectories=trajectories or None,
        live=live,
        runs=[_header(run) for run in runs],
        comparison=_side_by_side(runs),
        sections=found,
        trajectory_note=_note(trajectories),
    )


def _note(trajectories: Sequence[Mapping[str, Any]]) -> str:
    if not trajectories:
        return ""
    parts = []
    for run in trajectories:
        steps = ", ".join(str(step["step"]) for step in run["steps"])
        where = f" of {run['label']}" if len(trajectories) > 1 else ""
        parts.append(f"Steps {steps} of the {run['batches']} stored{where}.")
    return " ".join(
        [
            *parts,
            f"Of each, {GROUPS} groups at even distances, whatever they hold, and up to",
            f"{COMPLETIONS} trajectories of a group. No more than about {TOKENS:,} tokens in all,",
            f"and {LONGEST:,} of a turn. The rest is in trajectories/train/*.parquet.",
        ]
    )


def _header(run: RunData) -> dict[str, Any]:
    facts = _facts(run)
    preset = PRESETS.get(run.settings.algorithm) if run.settings else None
    given = changed(run.spec) if run.spec else {}
    versions = run.config.get("versions") or {}
    return {
        "label": run.label,
        "folder": str(run.folder),
        "running": run.running,
        "status": _status(run),
        "tiles": [(name, value) for name, value in facts.items() if value],
        "formula": preset.formula if preset else "",
        "source": preset.source if preset else "",
        "settings_list": [
            (key, _json(value), key in given) for key, value in flat(run.spec or {}).items()
        ],
        "versions": "Begun with " + ", ".join(f"{k} {v}" for k, v in versions.items()) + "."
        if versions
        else "",
    }


def _status(run: RunData) -> str:
    if run.running:
        return "running"
    return "finished" if run.spec and run.steps >= run.spec.get("steps", 0) else "not running"


def _facts(run: RunData) -> dict[str, str]:
    """Name -> value; '' where it is not known."""
    heldout, rewards = run.heldout(), run.values("train/reward")
    seconds, tokens = run.values("time/step"), run.values("tokens/completion")
    if len(heldout) > 1:
        name, reward = "held-out reward", f"{heldout[0][1]:.3f} → {heldout[-1][1]:.3f}"
    elif len(rewards) > 1:
        name, reward = "train reward", f"{rewards[0]:.3f} → {rewards[-1]:.3f}"
    else:
        name, reward = "reward", ""
    planned = run.spec.get("steps") if run.spec else None
    whole = sum(seconds)
    return {
        name: reward,
        "model": str(run.config.get("base_model") or ""),
        "method": run.settings.algorithm if run.settings else "",
        "clip range": _clip_range(run),
        "steps": f"{run.steps} of {planned}" if planned else str(run.steps),
        "time in steps": duration(whole) if whole else "",
        "sampled tokens": f"{sum(tokens):,.0f}" if tokens else "",
        "sampled tokens a second": f"{sum(tokens) / whole:,.0f}" if whole else "",
    }


def _clip_range(run: RunData) -> str:
    if run.settings is not None and not run.settings.objective.has_range:
        return "none"
    low, high = run.values("ratio/epsilon_low"), run.values("ratio/epsilon_high")
    if not low or not high:
        return ""
    auto = "auto, " if run.settings is not None and run.settings.auto_epsilon else ""
    return f"{auto}{low[-1]:.2g} / {high[-1]:.2g}"


def _side_by_side(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Rows of the header's table: the facts, and the settings in which the runs differ."""
    if len(runs) == 1:
        return []
    columns = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, [column.get(name, "") for column in columns]) for name in names]
    specs = [flat(run.spec or {}) for run in runs]
    for key in dict.fromkeys(key for spec in specs for key in spec):
        values = [
            json.dumps(spec[key], ensure_ascii=False) if key in spec else "" for spec in specs
        ]
        if len(set(values)) > 1 and key not in ("name", "project", "path", "steps"):
            rows.append((key, values))
    return [(name, values) for name, values in rows if any(values)]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def duration(seconds: float) -> str:
    """Hours, minutes or seconds.

    >>> duration(75), duration(7260), duration(3.21)
    ('1 min 15 s', '2 h 1 min', '3.2 s')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
