"""The report of a comparison, from what `gspo compare` stores in comparison.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gspo.lab.report.comparison_charts import (
    NO_DIFFERENCE,
    bounds,
    curve_charts,
    end_charts,
    forest_charts,
    shown,
    stress_label,
)
from gspo.lab.report.page import render
from gspo.lab.report.run_page import duration

_COLUMNS = (
    ("reward_after", "reward at the end", ".3f"),
    ("auc", "AUC", ".3f"),
    ("collapsed", "collapsed", ".0%"),
    ("clip_fraction", "sequences clipped", ".1%"),
    ("clip_fraction_tokens", "tokens clipped", ".1%"),
    ("experts_changed", "experts changed", ".2%"),
    ("entropy", "entropy", ".3f"),
    ("grad_norm", "gradient norm", ".3g"),
    ("log_ratio_p01", "l_i 1 %", ".2g"),
    ("log_ratio_p50", "median", ".2g"),
    ("log_ratio_p99", "99 %", ".2g"),
    ("seconds", "seconds", ",.0f"),
    ("tokens", "tokens", "k"),
)
_MAIN = ("val/reward", "train/reward")


def comparison_page(comparison: Mapping[str, Any], folder: Path | None = None) -> str:
    """The page of a comparison.

    Args:
        comparison: the object of comparison.json.
        folder: where that lies; links go to the cells' own reports that exist there.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    cells = comparison.get("cells", ())
    metrics = list(dict.fromkeys(name for cell in cells for name in (cell.get("curves") or {})))
    main = next((name for name in _MAIN if name in metrics), None)
    rewards = curve_charts(comparison, main) if main else []
    others = [(name, curve_charts(comparison, name, height=260)) for name in metrics]
    others = [(name, charts) for name, charts in others if name != main]
    ends, forests = end_charts(comparison), forest_charts(comparison)
    shared = [chart for _, charts in others for chart in charts]
    statuses = [str(cell.get("status")) for cell in cells]
    return render(
        "comparison.html",
        str(comparison.get("name", "comparison")),
        [*rewards, *ends, *forests, *shared],
        quick=bool(comparison.get("quick")),
        counts=[(name, statuses.count(name)) for name in dict.fromkeys(statuses)],
        columns=[label for _, label, _ in _COLUMNS],
        summary=[_summary_row(row) for row in comparison.get("summary", ())],
        main=main,
        rewards=rewards,
        ends=ends,
        forests=forests,
        paired=[_paired_row(row) for row in comparison.get("paired", ())],
        others=others,
        troubles=[_cell(c, folder) for c in cells if c.get("status") in ("failed", "refused")],
        cells=[_cell(cell, folder) for cell in cells],
        spec=_text(comparison.get("spec")),
        origin=_text({k: comparison[k] for k in ("versions", "machine") if k in comparison}),
    )


def verdict(row: Mapping[str, Any]) -> str:
    """What a paired difference says: its own verdict, never more than its interval does."""
    if row.get("low") is None or row.get("high") is None:
        return "too few seeds to tell"
    if not shown(row):
        return NO_DIFFERENCE
    return str(row.get("verdict") or "difference shown")


def _summary_row(row: Mapping[str, Any]) -> dict[str, Any]:
    values = []
    for key, _, form in _COLUMNS:
        mean, low, high = bounds(row.get(key))
        text = _number(mean, form)
        if mean is not None and low != high:
            text += f" [{_number(low, form)}, {_number(high, form)}]"
        values.append(text)
    seeds = row.get("seeds")
    return {
        "arm": str(row["arm"]),
        "stress": stress_label(row.get("stress")),
        "seeds": str(len(seeds) if isinstance(seeds, list) else seeds),
        "values": values,
    }


def _paired_row(row: Mapping[str, Any]) -> dict[str, str]:
    low, high = _number(row.get("low"), ".3g"), _number(row.get("high"), ".3g")
    return {
        "pair": f"{row['a']} against {row['b']}",
        "stress": stress_label(row.get("stress")),
        "metric": f"{row['metric']} ({row['role']})" if "role" in row else str(row["metric"]),
        "n": str(row.get("n", "")),
        "difference": _number(row.get("difference"), "+.3g"),
        "interval": f"[{low}, {high}]",
        "verdict": verdict(row),
    }


def _cell(cell: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    before, after = (_number(cell.get(f"reward_{end}"), ".3f") for end in ("before", "after"))
    seconds = cell.get("seconds")
    return {
        "id": str(cell.get("id", "")),
        "arm": str(cell["arm"]),
        "stress": stress_label(cell.get("stress")),
        "seed": str(cell.get("seed", "")),
        "status": str(cell.get("status", "")) + (", collapsed" if cell.get("collapsed") else ""),
        "error": str(cell.get("error") or ""),
        "reward": f"{before} → {after}",
        "auc": _number(cell.get("auc"), ".3f"),
        "time": "" if seconds is None else duration(seconds),
        "link": _link(cell.get("run"), folder),
    }


def _link(run: Any, folder: Path | None) -> str:
    """Relative address of a run's own report; '' where there is none below `folder`."""
    if not run or folder is None:
        return ""
    base = folder.resolve()
    page = (base / str(run) / "report.html").resolve()
    if not page.is_relative_to(base) or not page.exists():
        return ""
    return "./" + quote(page.relative_to(base).as_posix())


def _number(value: Any, form: str) -> str:
    if form == "k" and value is not None:
        return f"{value / 1000:,.0f}k"
    return format(value, form) if isinstance(value, int | float) else ""


def _text(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) if value else ""
