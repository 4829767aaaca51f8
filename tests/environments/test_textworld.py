from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("textworld")

from gspo.core.errors import ConfigError
from gspo.environments import Action, load_environment
from gspo.environments.textworld import TextWorld


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GSPO_CACHE", str(tmp_path))
    return tmp_path


def test_a_game_is_made_once_and_won_by_its_command(cache: Path):
    make = load_environment("textworld:coin_collector", {"level": 1, "games": 3})
    game = make()
    opening = game.reset(4)
    assert "coin" in opening.splitlines()[0]  # the objective
    assert opening.splitlines()[-1].endswith("take coin")
    lost = game.step(Action("look"))
    assert (lost.reward, lost.done) == (0, False)
    won = game.step(Action(" take coin\n"))
    assert (won.reward, won.done) == (1.0, True)
    game.close()
    made = {path: path.stat().st_mtime_ns for path in cache.rglob("1.*")}
    assert len(made) >= 2
    again = make()
    assert again.reset(1) == opening  # 4 % 3
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("1.*")} == made
    assert make().instance(1) == make().instance(4) != make().instance(2)


def test_commands_can_be_hidden():
    game = TextWorld("house", games=2, commands=False, quest=1)
    assert "inventory" not in game.reset(0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hous", {}, "unknown game 'hous'. Did you mean 'house'"),
        ("coin_collector", {}, "the following arguments are required: --level"),
        ("house", {"romes": 2}, "unrecognized arguments: --romes=2"),
        ("house", {"rooms": "a"}, "invalid int value: 'a'"),
        ("house", {"games": 1}, "games = 1"),
    ],
)
def test_mistakes_are_named(name: str, options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        load_environment(f"textworld:{name}", options)
