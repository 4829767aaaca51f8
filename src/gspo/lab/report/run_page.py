"""The report of one run, or of several side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from gspo.core.errors import RunError
from gspo.experiment.saved_run import SavedRun
from gspo.lab.report.curves import charts_of
from gspo.lab.report.page import render
from gspo.lab.report.trajectory_browser import LONGEST, sampled_groups
from gspo.objective import PRESETS


def run_page(runs: Sequence[SavedRun]) -> str:
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
        presets=PRESETS,
    )


def _status(run: SavedRun) -> str:
    if run.running:
        return "running; this is a snapshot"
    return "finished" if run.options and run.steps >= run.options.get("steps", 0) else "not running"


def _table(runs: Sequence[SavedRun]) -> list[list[str]]:
    """One column per run: its result, and the settings in which the runs differ."""
    columns = [_facts(run) for run in runs]
    for key in dict.fromkeys(key for run in runs for key in run.options):
        values = [_json(run.options[key]) if key in run.options else "" for run in runs]
        if len(set(values)) > 1 and key not in ("name", "project", "path", "steps"):
            for column, value in zip(columns, values, strict=True):
                column[key] = value
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return [["", *(run.label for run in runs)], *(row for row in rows if any(row[1:]))]


def _facts(run: SavedRun) -> dict[str, str]:
    """Name -> value; '' for what is not known."""
    seconds, tokens = (sum(run.values(n).values()) for n in ("time/step", "tokens/completion"))
    clip_range = [[*run.values(f"ratio/epsilon_{end}").values()] for end in ("low", "high")]
    planned = run.options.get("steps")
    return {
        "held-out reward": _ends(run.values("val/reward")),
        "train reward": _ends(run.values("train/reward")),
        "model": str(run.config.get("base_model") or ""),
        "method": run.settings.algorithm if run.settings else "",
        "clip range": " / ".join(f"{epsilon[-1]:.2g}" for epsilon in clip_range if epsilon),
        "steps": f"{run.steps} of {planned}" if planned else str(run.steps),
        "time in steps": f"{seconds:,.0f} s" if seconds else "",
        "sampled tokens": f"{tokens:,.0f}" if tokens else "",
        "sampled tokens per second": f"{tokens / seconds:,.0f}" if seconds else "",
    }


def _ends(by_step: Mapping[int, float]) -> str:
    rewards = [*by_step.values()]
    return f"{rewards[0]:.3f} → {rewards[-1]:.3f}" if len(rewards) > 1 else ""


def _settings(run: SavedRun) -> list[list[str]]:
    """The options of spec.json, in bold if they are not the default."""
    bold, given = Markup("<b>{}</b>"), run.given
    rows = [
        [bold.format(text) if key in given else text for text in (key, _json(value))]
        for key, value in run.options.items()
    ]
    return [["option", "value"], *rows]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def read_runs(folders: Sequence[Path]) -> list[SavedRun]:
    """Read runs, and label them by the last two parts of their paths, or by all if these are equal.

    Raises:
        RunError: a folder that is not one of a run.
    """
    names = ["/".join(folder.resolve().parts[-2:]) for folder in folders]
    labels = names if len(set(names)) == len(names) else map(str, folders)
    for folder in folders:
        if not (folder / "metrics.jsonl").exists() and not (folder / "config.json").exists():
            raise RunError(
                f"{folder} has neither metrics.jsonl nor config.json: it is not the folder of a "
                "run. Give <path>/<project>/<name>, such as .gspo/demo/sort-1"
            )
    return [*map(SavedRun.of, folders, labels)]
