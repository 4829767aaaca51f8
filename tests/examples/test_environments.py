"""The scripts of examples/environments: what short games tell, and that training raises reward."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gspo.environments import Action, Step, load_environment

FOLDER = Path(__file__).parents[2] / "examples" / "environments"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Makes an environment of short.py."""
    monkeypatch.setenv("GSPO_CACHE", str(tmp_path))
    monkeypatch.chdir(FOLDER)
    return lambda name, **options: load_environment(f"short:{name}", options)()


def test_the_pole_is_told_by_a_digit_and_stands_if_it_is_followed(short: Any):
    pytest.importorskip("gymnasium")
    game, steps = short("Pole"), []
    told = game.reset(1)
    assert told in "45" and len({game.instance(seed) for seed in range(8)}) == 8
    game.reset(1)
    while not steps or not steps[-1].done:
        steps.append(game.step(Action("0" if told < "5" else "9")))
        told = steps[-1].text
    assert (len(steps), sum(step.reward for step in steps)) == (14, pytest.approx(1))
    game.reset(1)
    fallen = [game.step(Action("0")) for _ in range(4)]
    assert (fallen[-1].text, fallen[-1].done) == ("9", True)  # pushed to the left, it falls right
    assert 0.15 < sum(step.reward for step in fallen) < 0.3
    game.reset(1)
    assert game.step(Action("5")) == Step(done=True)


def test_a_guess_is_told_its_side_and_the_last_one_earns_by_nearness(short: Any):
    pytest.importorskip("textarena")
    game = short("Guess")
    assert game.reset(3) == "?"
    number = game._game.state.game_state["game_number"]
    assert game.step(Action(str(number - 1))).text == "+"
    assert game.step(Action(str(number + 1))).text == "-"
    step = game.step(Action(str(number - 90 if number > 500 else number + 90)))
    assert step.done and step.reward == pytest.approx(1 - 90 / 899)
    game.reset(3)
    assert game.step(Action("99")) == Step(done=True)
    game.reset(3)
    step = game.step(Action(str(number)))
    assert (step.reward, step.done) == (1, True)


def test_coins_are_told_by_exits_and_won_by_going_on(short: Any):
    pytest.importorskip("textworld")
    game = short("Coins", level=2, games=2)
    (away,) = game.reset(0)
    assert away in "2468" and game.possible == away
    assert game.step(Action("x")).text == away
    back = 10 - int(away)
    step = game.step(Action(away))
    assert (sorted(step.text), step.reward) == (sorted(f"5{back}"), 0)
    step = game.step(Action("5"))
    assert (step.reward, step.done) == (1, True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "package", "lessons", "steps", "gain"),
    [
        ("larger", None, 400, 9, 0.2),
        ("guess", "textarena", 800, 12, 0.05),
        ("coins", "textworld", 400, 10, 0.15),
        ("pole", "gymnasium", 200, 8, 0.2),
    ],
)
def test_a_warm_start_then_training_raises_the_held_out_reward(
    name: str, package: str | None, lessons: int, steps: int, gain: float, tmp_path: Path
):
    """docs/environments.md has longer runs. A solved game may be lost again within a step."""
    if package:
        pytest.importorskip(package)
    for file in (*FOLDER.glob("*.py"), FOLDER / f"{name}.toml"):
        shutil.copy(file, tmp_path)
    subprocess.run([sys.executable, "lessons.py", f"{name}.toml"], cwd=tmp_path, check=True)
    rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert len(rows) == lessons
    roles = [message["role"] for message in rows[0]["messages"]]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    command = [sys.executable, "-m", "gspo.cli", "train", f"{name}.toml", "--set", f"steps={steps}"]
    subprocess.run(command, cwd=tmp_path, check=True)
    log = tmp_path / f".gspo/environments/{name}/metrics.jsonl"
    rewards = {
        line["step"]: line["val/reward"]
        for line in map(json.loads, log.read_text().splitlines())
        if "val/reward" in line
    }
    assert rewards[steps] > rewards[1] + gain
