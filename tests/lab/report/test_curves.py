"""The charts of runs: the numbers that they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiment.small_runs import stored_run
from gspo.dev import TrainConfig
from gspo.experiment.saved_run import SavedRun
from gspo.lab.report.curves import CHARTS, charts_of
from gspo.lab.report.run_page import read_runs
from gspo.train.settings import Settings, resolve
from lab.report.report_cases import run_folder, traces_of

REWARD, CLIPPED, NORM = "Reward", "Share clipped", "Gradient norm before clipping"
RATIOS = "Log-ratios of sequences, l_i = mean of d_t, in nats"
NOISE = "Engine against trainer on unchanged weights, in nats"
ENTROPY = "Entropy, in nats per trained token"
SECONDS = "Seconds per step, without evaluations"


def curves_of(runs: list[SavedRun]) -> dict[str, dict[str, Any]]:
    """Title of a chart -> name of a curve -> the curve."""
    return {
        title: {trace.name: trace for trace in traces_of(figure)}
        for figures in charts_of(runs).values()
        for title, figure in figures.items()
    }


def logged(records: list[dict[str, float]], settings: Settings | None = None) -> SavedRun:
    """A run that has logged these lines."""
    run = SavedRun(Path("p/m"), {}, {}, "p/m")
    run.__dict__.update(records=records, settings=settings)
    return run


def test_charts_hold_the_runs_numbers(tmp_path: Path):
    charts = curves_of(read_runs([run_folder(tmp_path)]))
    rewards = charts[REWARD]["train"]
    assert (list(rewards.x), list(rewards.y)) == ([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4])
    heldout = charts[REWARD]["held-out, 95 % interval"]
    assert (list(heldout.x), list(heldout.y)) == ([0, 4], [0.25, 0.75])
    assert list(heldout.error_y.array) == pytest.approx([0.05, 0.05])
    assert list(charts[SECONDS]["train"].y) == [0.5] * 4
    assert charts[RATIOS]["clip range, low"].y[0] == pytest.approx(-3.00045e-4)
    assert charts[RATIOS]["clip range, high"].y[0] == pytest.approx(3.9992e-4)
    assert not any("KL" in title for title in charts)  # logged as 0: not measured
    assert "by noise alone" in charts[CLIPPED]  # 0 too, but measured


def test_of_several_runs_the_first_metric_is_drawn(tmp_path: Path):
    one, two = run_folder(tmp_path, "one"), run_folder(tmp_path, "<b>two", steps=6)
    charts = curves_of(read_runs([one, two]))
    figures = {
        t: figure
        for charts in charts_of(read_runs([one, two])).values()
        for t, figure in charts.items()
    }
    assert figures[ENTROPY].layout.yaxis.title.text == "loss/entropy"
    assert list(charts[ENTROPY]) == ["p/one", "p/&lt;b&gt;two"]
    assert len({trace.line.color for trace in charts[NORM].values()}) == 2
    assert [len(trace.x) for trace in charts[SECONDS].values()] == [4, 6]
    dots = charts[REWARD]["p/one, held-out, 95 % interval"]
    assert dots.marker.color == charts[REWARD]["p/one"].line.color
    assert "clip range, low" not in charts[RATIOS]


def test_numbers_that_are_not_finite_leave_gaps(tmp_path: Path):
    folder = run_folder(tmp_path)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/reward": NaN, "loss/entropy": Infinity}\n{"step": 6, "tr')
    charts = curves_of(read_runs([folder]))
    assert charts[ENTROPY]["entropy"].y[-2:] == (0.4, None)
    assert list(charts[REWARD]["train"].x) == [1, 2, 3, 4, 5]


def test_a_logarithmic_axis_takes_sizes_and_no_zero(tmp_path: Path):
    records = [
        {"step": 1, "mismatch/log_ratio_mean": -0.5},
        {"step": 2, "mismatch/log_ratio_mean": 0.0},
    ]
    run = logged(records)
    ((_, curves),) = curves_of([run]).items()
    assert curves["mean of tokens"].y == (0.5, None)
    ((title, figure),) = charts_of([run])["The clip"].items()
    assert title == NOISE and figure.layout.yaxis.type == "log"
    ((_, curves),) = curves_of([logged([records[1]])]).items()
    assert curves["mean of tokens, always 0"].y == (None,)


@pytest.mark.parametrize(("algorithm", "shown"), [("gspo", True), ("grpo", False)])
def test_only_methods_that_clip_sequences_have_a_range_of_sequences(algorithm: str, shown: bool):
    records = [
        {"step": 1, "ratio/log_p50": 0.1, "ratio/epsilon_low": 0.2, "ratio/epsilon_high": 0.2}
    ]
    run = logged(records, resolve(options=TrainConfig(algorithm=algorithm)))
    assert ("clip range, low" in curves_of([run])[RATIOS]) == shown


def test_long_runs_are_drawn_as_they_were_logged():
    records = [{"step": step, "train/reward": float(step % 2)} for step in range(1, 41)]
    run = logged(records)
    assert list(curves_of([run])[REWARD]["train"].y) == [1.0, 0.0] * 20


def test_each_chart_of_the_file_is_drawn_and_names_its_metric():
    metrics = [metric for chart in CHARTS for metric in chart["curves"]]
    records = [{"step": 1, **dict.fromkeys(metrics, 0.5)}]
    run = logged(records)
    drawn = curves_of([run])
    assert list(drawn) == [chart["title"] for chart in CHARTS]
    for chart in CHARTS:
        for metric, name in chart["curves"].items():
            traces = {trace.hovertemplate for key, trace in drawn[chart["title"]].items() if name}
            assert f"%{{y}} ({metric})" in traces


def test_trajectories_are_counted_by_reward(tmp_path: Path):
    run = read_runs([stored_run(tmp_path)])
    figure = charts_of(run)["Learning"]["Trajectories by reward"]
    (bars,) = figure.data
    assert (bars.name, sorted(bars.x)) == ("step 3", [0, 1, 1])  # pyright: ignore[reportAttributeAccessIssue]
