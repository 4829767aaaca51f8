"""The report of one run, or of several side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence

from markupsafe import Markup

from gspo.lab.report.curves import charts_of
from gspo.lab.report.page import render
from gspo.lab.report.run_data import RunData, changed
from gspo.lab.report.trajectory_browser import LONGEST, sampled_groups


def run_page(runs: Sequence[RunData]) -> str:
    """The page of these runs."""
    return render(
        "run.html",
        ", ".join(run.label for run in runs),
        [f"{run.label}: {_status(run)}" for run in runs],
        charts_of(runs),
        runs=runs,
        result=_table(runs),
        settings=[_settings(run) for run in runs],
        groups=[group for run in runs for group in sampled_groups(run)],
        longest=LONGEST,
    )


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


def _settings(run: RunData) -> list[list[str]]:
    """The options of spec.json, in bold if they are not the default."""
    bold, given = Markup("<b>{}</b>"), changed(run.spec)
    rows = [
        [bold.format(text) if key in given else text for text in (key, _json(value))]
        for key, value in run.spec.items()
    ]
    return [["option", "value"], *rows]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
