"""The report of one run, or of several side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence

from markupsafe import Markup

from gspo.lab.report.curves import sections
from gspo.lab.report.page import Section, render
from gspo.lab.report.run_data import RunData, changed
from gspo.lab.report.trajectories import LONGEST, sampled_groups
from gspo.objective import PRESETS

_COUNTED = {
    "train/skipped": "steps made no update",
    "train/exceptions": "rollouts failed",
    "train/trajectories_too_long": "trajectories were longer than the context and left out",
    "ratio/extreme": "sequences had ratios beyond what float32 can weigh",
}
"""Metrics that should stay 0, in words."""
_TRAJECTORIES = (
    "Orange: more likely now than when it was sampled; blue: less, by d_t = log π - log π_old of "
    "the token at its last update. The pointer on a token shows its numbers. Steps and groups are "
    f"taken at even distances, whatever they hold, with up to {LONGEST} tokens per trajectory. "
    "The rest is in trajectories/train/*.parquet."
)


def run_page(runs: Sequence[RunData]) -> str:
    """The page of these runs."""
    groups = [group for run in runs for group in sampled_groups(run)]
    warnings = [
        f"{run.label}: {total:,.0f} {words}."
        for run in runs
        for key, words in _COUNTED.items()
        if (total := sum(run.values(key)))
    ]
    parts = [
        Section("Result", table=_table(runs), warnings=warnings),
        *(_settings(run) for run in runs),
        *(sections(runs) or [Section("Learning", "No step has been made yet.")]),
        Section("Sampled trajectories", _TRAJECTORIES if groups else ""),
    ]
    status = [f"{run.label}: {_status(run)}" for run in runs]
    return render(", ".join(run.label for run in runs), status, parts, groups)


def _status(run: RunData) -> str:
    if run.running:
        return "running; this is a snapshot"
    return "finished" if run.spec and run.steps >= run.spec.get("steps", 0) else "not running"


def _table(runs: Sequence[RunData]) -> list[list[str]]:
    """One column per run: its result, and the settings in which the runs differ."""
    columns = [_facts(run) for run in runs]
    for key in dict.fromkeys(key for run in runs for key in run.spec):
        values = [_json(run.spec[key]) if key in run.spec else "" for run in runs]
        if len(set(values)) > 1 and key not in ("name", "project", "path", "steps"):
            for column, value in zip(columns, values, strict=True):
                column[key] = value
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return [["", *(run.label for run in runs)], *(row for row in rows if any(row[1:]))]


def _facts(run: RunData) -> dict[str, str]:
    """Name -> value; '' for what is not known."""
    heldout = [mean for _, mean, _, _ in run.heldout()]
    seconds, tokens = sum(run.values("time/step")), sum(run.values("tokens/completion"))
    clip_range = [run.values(f"ratio/epsilon_{end}") for end in ("low", "high")]
    planned = run.spec.get("steps")
    return {
        "held-out reward": _ends(heldout),
        "train reward": _ends(run.values("train/reward")),
        "model": str(run.config.get("base_model") or ""),
        "method": run.settings.algorithm if run.settings else "",
        "clip range": " / ".join(f"{epsilon[-1]:.2g}" for epsilon in clip_range if epsilon),
        "steps": f"{run.steps} of {planned}" if planned else str(run.steps),
        "time in steps": f"{seconds:,.0f} s" if seconds else "",
        "sampled tokens": f"{tokens:,.0f}" if tokens else "",
        "sampled tokens per second": f"{tokens / seconds:,.0f}" if seconds else "",
    }


def _ends(rewards: Sequence[float]) -> str:
    return f"{rewards[0]:.3f} → {rewards[-1]:.3f}" if len(rewards) > 1 else ""


def _settings(run: RunData) -> Section:
    """The options of spec.json, in bold if they are not the default."""
    preset = PRESETS.get(run.settings.algorithm) if run.settings else None
    bold, given = Markup("<b>{}</b>"), changed(run.spec)
    rows = [
        [bold.format(text) if key in given else text for text in (key, _json(value))]
        for key, value in run.spec.items()
    ]
    versions = ", ".join(f"{name} {text}" for name, text in run.config.get("versions", {}).items())
    no_spec = "This run has no spec.json: its settings are in the program that trained it."
    words = [
        f"{preset.formula} ({preset.source})." if preset else "",
        "Bold: not the default." if rows else no_spec,
        f"Begun with {versions}." if versions else "",
        str(run.folder),
    ]
    table = [["option", "value"], *rows] if rows else ()
    return Section(f"Settings of {run.label}", " ".join(words), table=table, folded=True)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
