from __future__ import annotations

import random

import pytest

pytest.importorskip("textarena")

from gspo.core.errors import ConfigError
from gspo.environments import Action, load_environment

EASY = {"max_number": 8, "max_turns": 4}


def test_a_game_says_what_is_new_and_rewards_its_end():
    game = load_environment("textarena:GuessTheNumber-v0", EASY)()
    assert "between 1 and 8" in game.reset(3)
    assert game.instance(3) == "{'game_number': 4, 'guess_history': []}"
    game.reset(3)
    step = game.step(Action("6"))  # brackets are added
    assert (step.text, step.reward, step.done) == ("The target number is lower.", 0.0, False)
    step = game.step(Action("I say [4]."))
    assert (step.reward, step.done) == (1, True)


def test_games_side_by_side_draw_each_for_itself_and_leave_the_global_generator_alone():
    make = load_environment("textarena:Minesweeper-v0-small")
    boards = []
    for together in (False, True):
        random.seed(1)
        before = random.getstate()
        games = [make(), make()]
        for seed, game in enumerate(games):
            game.reset(seed)
        for game in games if together else games[:1]:
            game.step(Action("[0 0]"))  # mines are laid at the first step
        boards.append(games[0].step(Action("[1 1]")).text)
        assert random.getstate() == before
    assert boards[0] == boards[1]


@pytest.mark.parametrize(
    ("game", "options", "message"),
    [
        ("GuesTheNumber-v0", {}, "no game 'GuesTheNumber-v0'. Did you mean 'GuessTheNumber-v0'"),
        ("GuessTheNumber-v0", {"most": 3}, "unexpected keyword argument 'most'"),
    ],
)
def test_mistakes_are_named(game: str, options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        load_environment(f"textarena:{game}", options)
