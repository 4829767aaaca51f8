"""The report of a comparison: means and intervals over seeds, verdicts, links."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from gspo.lab.report.comparison_page import comparison_page, curve_charts, rows_of
from lab.report.page_elements import Elements
from lab.report.report_cases import comparison, traces_of


def test_the_page_has_every_part():
    case = comparison()
    page = comparison_page(case)
    elements = Elements(page)
    assert elements.charts == 2 * 2 + 1 + 1
    assert "1 failed" in page and "1 refused" in page and "17 done" in page
    assert "NumericsError: a gradient is not finite &lt;b&gt;" in page
    assert page.count("<td>no difference shown</td>") == 2
    assert "<td>gspo-auto is higher</td>" in page
    assert "<td>rollout_dtype=int4</td>" in page
    assert "<td>31.0%</td>" in page and "<td>0.3 [0.2, 0.4]</td>" not in page
    for tag, attributes in elements.tags:
        assert not {"src", "href"} & set(attributes), tag


def test_numbers_stand_with_their_intervals():
    row: dict[str, Any] = {"arm": "a", "stress": {}, "seeds": 3, "auc": None}
    row["reward_after"] = {"mean": 0.5, "low": 0.25, "high": 0.75}
    row["collapsed"] = {"mean": 0.0, "low": None, "high": None}
    page = comparison_page({"summary": [row]})
    cells = (
        "<td>a</td><td>no stress</td><td>3</td><td>0.500 [0.250, 0.750]</td><td></td><td>0%</td>"
    )
    assert cells in page


def test_curves_are_those_of_the_summary():
    case = comparison()
    charts = curve_charts(rows_of(case, "summary"))
    assert list(charts) == [
        f"{metric}, {stress}"
        for metric in ("val/reward", "loss/entropy")
        for stress in ("no stress", "rollout_dtype=int4")
    ]
    traces = traces_of(charts["val/reward, rollout_dtype=int4"])
    lines = [trace for trace in traces if trace.line.width != 0]
    assert [trace.name for trace in lines] == ["gspo", "gspo-auto", "grpo"]
    stored = case["summary"][3]["curves"]["val/reward"]
    assert list(lines[0].y) == stored["mean"]
    low, high = traces[0], traces[1]
    # The interval of the first step is not known.
    assert (list(low.x), list(low.y)) == (stored["step"][1:], stored["low"][1:])
    assert list(high.y) == stored["high"][1:] and high.fill == "tonexty"


def test_intervals_reach_from_low_to_high():
    paired = [
        {
            "a": "x",
            "b": "y",
            "stress": {},
            "metric": "auc",
            "difference": 0.2,
            "low": low,
            "high": high,
        }
        for low, high in ((0.1, 0.5), (None, None))
    ]
    script = Elements(comparison_page({"paired": paired})).scripts[-1]
    data = json.loads(re.search(r"newPlot\(\s*\"chart-1\",\s*(\[.*?\]),\s*{", script)[1])  # pyright: ignore[reportOptionalSubscript]
    assert data[0]["x"] == [0.2, 0.2] and data[0]["y"] == ["x - y, no stress, auc"] * 2
    assert data[0]["error_x"]["array"] == [pytest.approx(0.3), None]
    assert data[0]["error_x"]["arrayminus"] == [pytest.approx(0.1), None]


def test_a_comparison_that_is_not_finished_has_a_page():
    case = comparison()
    unknown: dict[str, Any] = {"reward_after": None, "auc": None, "curves": {}, "seconds": None}
    for cell in case["cells"]:
        cell |= unknown | {"status": "pending"}
    page = comparison_page(case | {"summary": [], "paired": []})
    assert "19 pending" in page
    assert Elements(page).charts == 0


def test_names_stay_text():
    attack = "<img src=x onerror=alert()>"
    case = json.loads(json.dumps(comparison()).replace("gspo-auto", attack))
    page = Elements(comparison_page(case | {"name": "</title><script>alert(1)</script>"}))
    tags = [tag for tag, _ in page.tags]
    assert "img" not in tags and tags.count("script") == page.charts + 2
    names = {
        trace.name
        for figure in curve_charts(rows_of(case, "summary")).values()
        for trace in traces_of(figure)
    }
    assert "&lt;img src=x onerror=alert()&gt;" in names  # plotly's own markup is shut out too
