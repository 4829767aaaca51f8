"""The report of a comparison: means and intervals over seeds, and verdicts that claim no more."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gspo.cli import app
from gspo.core.errors import ConfigError, RunError
from gspo.lab.report.command import make_report
from gspo.lab.report.comparison import comparison_page, verdict
from gspo.lab.report.comparison_charts import curve_charts, end_charts, forest_charts
from gspo.lab.report.seeds import seed_curve
from lab.report_cases import comparison, run_folder
from lab.test_report import Elements


def test_the_interval_over_seeds_is_the_textbooks():
    curves = [{"step": [1, 2], "value": [value, 5.0]} for value in (1.0, 2.0, 4.0)]
    found = seed_curve([*curves, {"step": [3], "value": [7.0]}])
    deviation = math.sqrt(((1 - 7 / 3) ** 2 + (2 - 7 / 3) ** 2 + (4 - 7 / 3) ** 2) / 2)
    assert found.mean == pytest.approx([7 / 3, 5.0, 7.0])
    low, high = found.low[0], found.high[0]
    assert high is not None and low is not None
    assert high - 7 / 3 == pytest.approx(4.3027 * deviation / math.sqrt(3), rel=1e-4)
    assert 7 / 3 - low == pytest.approx(high - 7 / 3)
    # Neither values that are all the same nor one alone say how sure their mean is.
    assert found.low[1:] == found.high[1:] == [None, None]


def test_seeds_meet_at_their_common_steps():
    curves = [
        {"step": [0, 5, 10], "value": [0.0, 1.0, 2.0]},
        {"step": [0, 5], "value": [2.0, math.nan]},
    ]
    found = seed_curve(curves)
    assert (found.steps, found.mean) == ([0, 5, 10], [1.0, 1.0, 2.0])
    assert found.low[1:] == [None, None] and found.low[0] is not None


def test_the_page_has_every_part():
    case = comparison()
    page = comparison_page(case)
    elements = Elements(page)
    charts = elements.embedded("chart-data")
    rewards = charts["val/reward rollout_dtype=int4"]["data"]
    lines = [trace for trace in rewards if trace.get("fill") is None and trace["line"]["width"]]
    assert [trace["name"] for trace in lines] == ["gspo", "gspo-auto", "grpo"]
    own = [
        cell["curves"]["val/reward"]["value"]
        for cell in case["cells"]
        if cell["arm"] == "gspo" and cell["stress"] and cell["curves"]
    ]
    assert lines[0]["y"] == pytest.approx([sum(v) / 3 for v in zip(*own, strict=True)])
    assert elements.figures == sorted(charts)
    assert {"end reward_after", "end auc", "end collapsed", "end seconds"} <= set(charts)
    assert "1 failed" in page and "1 refused" in page and "17 done" in page
    assert "NumericsError: a gradient is not finite &lt;b&gt;" in page
    assert page.count("no difference shown</td>") == 2
    assert "gspo-auto is higher</td>" in page
    for tag, attributes in elements.tags:
        assert not {"src", "href"} & set(attributes), tag


def test_a_verdict_never_says_more_than_its_interval():
    row = {"a": "x", "b": "y", "metric": "auc", "difference": 0.1, "verdict": "x is higher"}
    assert verdict(row | {"low": 0.05, "high": 0.15}) == "x is higher"
    assert verdict(row | {"low": -0.05, "high": 0.25}) == "no difference shown"
    assert verdict(row | {"low": 0.0, "high": 0.2}) == "no difference shown"
    assert verdict(row | {"low": None, "high": None}) == "too few seeds to tell"


def test_the_forest_marks_what_crosses_zero():
    (chart,) = forest_charts(comparison())
    by_name = {trace["name"]: trace for trace in chart.data}
    assert by_name["difference shown"]["x"] == [0.21, 0.15]
    assert by_name["no difference shown"]["x"] == [0.02, 0.01]
    assert by_name["difference shown"]["error_x"]["array"] == pytest.approx([0.06, 0.07])
    assert "error_y" not in by_name["difference shown"]
    assert len(chart.layout["yaxis"]["categoryarray"]) == 4


def test_every_figure_is_one_that_plotly_accepts():
    figures = pytest.importorskip("plotly.graph_objects")
    case = comparison()
    charts = [*curve_charts(case, "val/reward"), *end_charts(case), *forest_charts(case)]
    for chart in charts:
        text = re.sub(r'"@[a-z]+(/[\d.]+)?"', '"#0b63b0"', json.dumps(chart.figure()))
        figures.Figure(json.loads(text))


def test_a_comparison_that_is_not_finished_has_a_page():
    case = comparison()
    unknown: dict[str, Any] = {"reward_after": None, "auc": None, "curves": {}, "seconds": None}
    for cell in case["cells"]:
        cell |= unknown | {"status": "pending"}
    page = comparison_page(case | {"summary": [], "paired": []})
    assert "19 pending" in page
    assert Elements(page).embedded("chart-data") == {}


def test_links_lead_to_reports_that_exist_inside(tmp_path: Path):
    case = comparison()
    folder = tmp_path / "compared"
    run = folder / "runs" / "gspo-plain-0"
    run.mkdir(parents=True)
    (run / "report.html").write_text("x")
    (tmp_path / "report.html").write_text("outside")
    case["cells"][1]["run"] = ".."
    case["cells"][2]["run"] = "javascript:alert(1)"
    elements = Elements(comparison_page(case, folder))
    links = [attributes["href"] for tag, attributes in elements.tags if tag == "a"]
    assert links == ["./runs/gspo-plain-0/report.html"]


def test_names_stay_text():
    case = json.loads(json.dumps(comparison()).replace("gspo-auto", "<img src=x onerror=alert()>"))
    page = Elements(comparison_page(case | {"name": "</title><script>alert(1)</script>"}))
    tags = [tag for tag, _ in page.tags]
    assert "img" not in tags and tags.count("script") == 4
    charts = page.embedded("chart-data").values()
    names = {trace.get("name") for chart in charts for trace in chart["data"]}
    assert "&lt;img src=x onerror=alert()&gt;" in names  # plotly's own markup is shut out too


def test_the_command_knows_a_comparison(tmp_path: Path):
    (tmp_path / "comparison.json").write_text(json.dumps(comparison()))
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 0
    assert "sort: three methods" in (tmp_path / "report.html").read_text()
    with pytest.raises(ConfigError, match="--watch follows runs"):
        make_report([tmp_path], None, True)
    with pytest.raises(ConfigError, match="give it alone"):
        make_report([tmp_path, run_folder(tmp_path / "r")], tmp_path / "x.html", False)
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(RunError, match=r"comparison\.json is damaged"):
        make_report([tmp_path], None, False)
