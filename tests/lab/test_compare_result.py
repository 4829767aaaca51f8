"""What comparison.json says, from runs that are written by hand."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from intervals import false_collapses

from gspo.experiment.heldout import Interval, share_interval
from gspo.lab.compare import CompareSpec
from gspo.lab.compare_cells import make_cells
from gspo.lab.compare_result import area, collapsed, comparison, write_comparison
from gspo.lab.statistics import t_interval
from lab.written import write_run


def small(path: Path, **fields: Any) -> CompareSpec:
    base = {"task": "sort", "steps": 2}
    return CompareSpec(
        **{"path": str(path), "base": base, "presets": ["gspo", "grpo"], "seeds": 3, **fields}
    )


def test_cells_carry_curves_area_and_collapse(tmp_path: Path):
    compare = small(tmp_path, presets=["gspo"], seeds=1)
    (cell,) = make_cells(compare)
    write_run(cell, [0.3, 0.8, 0.35])
    row = comparison(compare, [cell])["cells"][0]
    assert (row["reward_before"], row["reward_after"]) == (0.3, 0.35)
    assert row["auc"] == pytest.approx((0.3 + 0.8) / 4 + (0.8 + 0.35) / 4)
    assert row["collapsed"] is True
    assert (row["seconds"], row["tokens"]) == (1.0, 200)
    assert row["curves"]["val/reward"] == {"step": [0, 1, 2], "value": [0.3, 0.8, 0.35]}
    assert (compare.folder / row["run"]).resolve() == cell.folder.resolve()


def test_without_evaluations_between_the_area_is_of_the_training_reward(tmp_path: Path):
    compare = small(tmp_path, presets=["gspo"], seeds=1)
    (cell,) = make_cells(compare)
    write_run(cell, [0.3, 0.8, 0.5])
    path = cell.folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1] = {k: v for k, v in lines[1].items() if not k.startswith("val/")}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = comparison(compare, [cell])["cells"][0]
    assert row["auc"] == pytest.approx((0.7 + 0.4) / 2)


def test_summaries_and_pairs_are_by_seed(tmp_path: Path):
    compare = small(tmp_path)
    cells = make_cells(compare)
    ends = {"gspo": [0.5, 0.6, 0.8], "grpo": [0.4, 0.45, 0.74]}
    for cell in cells:
        write_run(
            cell,
            [0.3, 0.4, ends[cell.arm][cell.seed]],
            {"ratio/clip_fraction": 0.1 * (cell.seed + 1)},
        )
    content = comparison(compare, cells)
    ours = content["summary"][0]
    expected = t_interval(ends["gspo"])
    assert ours["reward_after"] == {
        "mean": expected.mean,
        "low": expected.low,
        "high": expected.high,
    }
    assert (ours["seeds"], ours["collapsed"]) == (3, asdict(share_interval(0, 3)))
    assert ours["means"]["ratio/clip_fraction"] == pytest.approx(0.2)
    assert "loss/entropy" not in ours["means"]
    primary, pair = content["paired"]
    assert (primary["metric"], primary["role"]) == ("auc", "primary")
    assert (pair["a"], pair["b"], pair["metric"], pair["n"]) == ("gspo", "grpo", "reward_after", 3)
    assert pair["role"] == "secondary"
    t = pair["difference"] / math.sqrt(0.00203333333 / 3)
    assert pair["p"] == pytest.approx(1 - t / math.sqrt(t * t + 2))  # 2 degrees of freedom
    # Differences 0.1, 0.15, 0.06: mean 0.10333, standard error 0.0451/sqrt(3), t 4.3027.
    assert pair["difference"] == pytest.approx(0.31 / 3)
    half = 4.302652729749462 * math.sqrt(0.00203333333) / math.sqrt(3)
    assert pair["high"] - pair["difference"] == pytest.approx(half, rel=1e-4)
    assert pair["verdict"] == "no difference shown"


def test_missing_cells_leave_the_rest_comparable(tmp_path: Path):
    compare = small(tmp_path)
    cells = make_cells(compare)
    for cell in cells:
        if cell.id != "grpo seed=1":
            write_run(cell, [0.3, 0.4, 0.5 + 0.01 * cell.seed])
    (missing,) = [cell for cell in cells if cell.status == "pending"]
    assert missing.id == "grpo seed=1"
    missing.status, missing.error = "failed", "NumericsError: not finite"
    content = comparison(compare, cells)
    assert [row["seeds"] for row in content["summary"]] == [3, 2]
    assert {pair["n"] for pair in content["paired"]} == {2}


def test_a_baseline_is_compared_with_each_arm_alone(tmp_path: Path):
    compare = small(tmp_path, presets=["gspo", "grpo", "dapo"], baseline="grpo", seeds=2)
    cells = make_cells(compare)
    for cell in cells:
        write_run(cell, [0.3, 0.4, 0.5])
    paired = comparison(compare, cells)["paired"]
    assert {(pair["a"], pair["b"]) for pair in paired} == {("gspo", "grpo"), ("dapo", "grpo")}
    free = compare.model_copy(update={"baseline": None})
    assert len(comparison(free, cells)["paired"]) == 2 * 3


def test_the_file_is_json_without_nan(tmp_path: Path):
    compare = small(tmp_path, seeds=1)
    cells = make_cells(compare)
    returned = write_comparison(compare, cells, quick=True)
    text = (compare.folder / "comparison.json").read_text()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert content["quick"] is True
    assert [cell["status"] for cell in content["cells"]] == ["pending", "pending"]
    assert content["paired"] == []
    assert content == json.loads(json.dumps(returned))


def evaluations(rewards: list[float], half: float | None = 0.02) -> list[Interval]:
    return [
        Interval(mean, None, None) if half is None else Interval(mean, mean - half, mean + half)
        for mean in rewards
    ]


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0.3, 0.6, 0.5], False),  # it kept two thirds of what it had gained
        ([0.3, 0.6, 0.42], False),  # less than half, but not for certain
        ([0.3, 0.6, 0.31], True),  # next to nothing
        ([0.3, 0.28], False),  # within the noise of the start
        ([0.3, 0.25], True),  # below the start
        ([0.3, 0.9, 0.1, 0.5], True),  # a third of what it had gained
        ([0.3, 0.9, 0.1, 0.7], False),  # recovered
        ([0.3], False),
        ([0.0, 0.002, 0.0], False),
        ([0.1, 0.2, 0.3], False),
        ([0.0, 0.1, 0.2, 0.15], False),  # improved overall
    ],
)
@pytest.mark.parametrize("zero", [0.0, -1.0, -1.2, 100.0])
def test_collapse_is_one_wherever_rewards_have_their_zero(
    rewards: list[float], expected: bool, zero: float
):
    assert collapsed(evaluations([zero + reward for reward in rewards])) is expected


def test_an_evaluation_without_an_interval_is_as_noisy_as_the_others():
    always_wrong = Interval(-1.0, None, None)
    assert collapsed([*evaluations([-0.4, 0.6], 0.05), always_wrong])
    assert not collapsed([*evaluations([-0.98, -0.96], 0.05), always_wrong])
    assert collapsed(evaluations([-1.0, -2.0], None))


@pytest.mark.parametrize("zero", [0.0, -1.0])
@pytest.mark.parametrize(
    ("mean", "prompts", "count"), [(0.002, 64, 6), (0.01, 64, 10), (0.3, 8, 6), (0.95, 16, 10)]
)
def test_runs_in_which_nothing_changes_dont_collapse(
    mean: float, prompts: int, count: int, zero: float
):
    # 2 %, and 3 standard errors. By half of the maximum it was up to 34 %.
    alarms = false_collapses(mean, prompts, count, 50, zero)
    assert alarms <= 0.02 + 3 * math.sqrt(0.02 * 0.98 / 50)


def test_area_doesnt_depend_on_how_often_it_was_measured():
    assert area([0, 4, 8], [0.0, 0.5, 1.0]) == area([0, 1, 8], [0.0, 0.125, 1.0]) == 0.5
    assert area([3], [0.7]) == 0.7


def test_a_run_is_finished_when_its_last_step_is_evaluated(tmp_path: Path):
    compare = small(tmp_path, presets=["gspo"], seeds=1)
    (cell,) = make_cells(compare)
    assert not cell.is_finished()
    write_run(cell, [0.3, 0.4, 0.5])
    assert cell.is_finished()
    path = cell.folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    for torn in ("\n".join(lines[:2]), '{"step": 2, "train/reward": 0.1}', '{"step": 2, "va', ""):
        path.write_text(torn)
        assert not cell.is_finished()
