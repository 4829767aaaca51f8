from __future__ import annotations

import pytest

from gspo.core.errors import ConfigError
from gspo.environments import Action, load_environment

gym = pytest.importorskip("gymnasium")


class Echo(gym.Env):
    """Says what it is told, until it is told to stop."""

    observation_space = action_space = gym.spaces.Text(20)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return f"say {self.np_random.integers(10)}", {}

    def step(self, action):
        return action, 0.5, action == "stop", False, {}


gym.register("Echo-v0", Echo, disable_env_checker=True)


def test_text_goes_in_and_out():
    game = load_environment("gymnasium:Echo-v0")()
    assert game.reset(1) == game.reset(1) == game.instance(1)
    assert game.step(Action("a\n")).text == "a\n"
    step = game.step(Action("stop"))
    assert (step.reward, step.done) == (0.5, True)


def test_discrete_actions_have_names():
    options = {"actions": ["stick", "hit"], "unknown": -2.0, "prompt": "Play."}
    game = load_environment("gymnasium:Blackjack-v1", options)()
    assert (game.reset(3), game.system_prompt) == ("(7, 10, 0)", "Play.")
    step = game.step(Action("jump"))
    assert (step.text, step.reward, step.done) == ("Actions: stick, hit", -2.0, False)
    step = game.step(Action(" hit"))
    assert (step.text, step.done) == ("(17, 10, 0)", False)
    assert game.step(Action("stick")).done
    game.close()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Blackjac-v1", {}, "Did you mean: `Blackjack`"),
        ("Blackjack-v1", {"actions": ["a"]}, "has 2 actions; actions = "),
        ("Blackjack-v1", {"decks": 2}, "unexpected keyword argument 'decks'"),
        ("MountainCarContinuous-v0", {}, "its actions, Box.* cannot be written"),
    ],
)
def test_mistakes_are_named(name: str, options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        load_environment(f"gymnasium:{name}", options)
