"""The games of examples/textworld: one is made, and played by somebody who knows how."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("textworld")
EXAMPLE = Path(__file__).parents[2] / "examples" / "textworld"


@pytest.fixture
def adventures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("GSPO_ADVENTURES", str(tmp_path))
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module("adventures")


def test_a_game_gives_its_points_on_the_way(adventures: Any, tmp_path: Path):
    game, thing, table = adventures.make_game(3)
    game.save(str(tmp_path / "3.json"))
    (tmp_path / "3.goal").write_text(json.dumps([thing, table]))
    played = adventures.Adventure(3)
    assert played.told(first=True).startswith(f"{thing} to {table}:a ")
    assert played.do("z") == played.do("go west") == 0.0  # no letter of a command
    earned = []
    while not played.done and len(earned) < adventures.MOST_TURNS:
        earned.append(played.do(played.expert()))
    assert played.done
    assert [reward for reward in earned if reward] == [0.5, 0.5]
    assert earned[-1] == 0.5
