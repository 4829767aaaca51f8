"""The report of a comparison: means and intervals over seeds, verdicts, links."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gspo.lab import compare_result
from gspo.lab.compare import CompareSpec
from gspo.lab.compare_cells import make_cells
from gspo.lab.report.comparison_page import comparison_page, curve_charts
from gspo.lab.statistics import t_interval
from lab.report.page_elements import Elements
from lab.report.report_cases import comparison, traces_of
from lab.written import write_run


def test_the_page_has_every_part():
    case = comparison()
    page = comparison_page(case)
    elements = Elements(page)
    assert elements.charts == 2 * 3
    assert "1 failed" in page and "1 refused" in page and "17 done" in page
    assert "NumericsError: a gradient is not finite &lt;b&gt;" in page
    assert page.count("<td>no difference shown</td>") == 2
    assert "<td>gspo-auto is higher</td>" in page
    assert "<th>rollout dtype=</th>" in page and "<td>int4</td>" in page
    assert "<td>0.31</td>" in page
    for tag, attributes in elements.tags:
        assert not {"src", "href"} & set(attributes), tag


def test_numbers_stand_with_their_intervals():
    row: dict[str, Any] = {"arm": "a", "stress": {}, "seeds": 3, "auc": None}
    row["reward_after"] = {"mean": 0.5, "low": 0.25, "high": 0.75}
    row["collapsed"] = {"mean": 0.0, "low": None, "high": None}
    page = comparison_page({"summary": [row]})
    cells = "<td>a</td><td>3</td><td>0.5 [0.25, 0.75]</td><td>-</td><td>0</td>"
    assert cells in page


def test_curves_are_means_over_the_seeds_with_their_intervals():
    case = comparison()
    charts = curve_charts(case["cells"])
    assert list(charts) == [
        f"{metric}, {stress}"
        for metric in ("val/reward", "loss/entropy", "ratio/clip_fraction")
        for stress in ("no stress", "rollout_dtype=int4")
    ]
    traces = traces_of(charts["val/reward, rollout_dtype=int4"])
    lines = [trace for trace in traces if trace.line.width != 0]
    assert [trace.name for trace in lines] == ["gspo", "gspo-auto", "grpo"]
    curves = [
        cell["curves"]["val/reward"]
        for cell in case["cells"]
        if (cell["arm"], cell["status"]) == ("gspo", "done") and cell["stress"]
    ]
    intervals = [t_interval(values) for values in zip(*(c["value"] for c in curves), strict=True)]
    low, high, mean = traces[:3]
    assert list(mean.x) == list(low.x) == curves[0]["step"]
    assert list(mean.y) == [interval.mean for interval in intervals]
    assert list(low.y) == [interval.low for interval in intervals]
    assert list(high.y) == [interval.high for interval in intervals] and high.fill == "tonexty"


def test_a_step_that_a_seed_lacks_has_no_mean_and_one_seed_no_interval():
    cells = [
        {"arm": "a", "stress": {}, "curves": {"val/reward": {"step": steps, "value": values}}}
        for steps, values in (([0, 1], [0.1, 0.3]), ([0], [0.2]))
    ]
    (figure,) = curve_charts(cells).values()
    assert [list(trace.x) for trace in traces_of(figure)] == [[0], [0], [0]]
    (figure,) = curve_charts(cells[:1]).values()
    low, high, mean = traces_of(figure)
    assert (list(low.x), list(high.x), list(mean.y)) == ([], [], [0.1, 0.3])


def test_what_gspo_compare_stores_has_curves(tmp_path: Path):
    options = {"base": {"task": "sort", "steps": 2}, "presets": ["gspo"], "seeds": 2}
    spec = CompareSpec(**options, path=str(tmp_path))  # pyright: ignore[reportArgumentType]
    cells = make_cells(spec)
    for cell in cells:
        write_run(cell, [0.3, 0.4, 0.5])
    stored = compare_result.comparison(spec, cells)
    charts = curve_charts(stored["cells"])
    assert list(charts) == [
        f"{metric}, no stress" for metric in ("val/reward", "train/reward", "ratio/clip_fraction")
    ]


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
        trace.name for figure in curve_charts(case["cells"]).values() for trace in traces_of(figure)
    }
    assert "&lt;img src=x onerror=alert()&gt;" in names  # plotly's own markup is shut out too
