"""Small games of TextWorld, played turn by turn, with what each turn earned.

    python adventures.py        # 220 games and demonstrations, into the folder of `FOLDER`

A game has two rooms, a closed box with two things in it, and two tables. Taking the right thing is
one point, putting it on the right table another: "open box", "take fig from box", "go east",
"put fig on mat". TextWorld's own logic decides what is possible and what scores. Its prose is left
out: a turn is told the commands that are possible now, each behind a letter, and answers with one
of the letters; the first turn is also told what is wanted.
"""

from __future__ import annotations

import json
import os
import random
from functools import cache
from importlib import import_module
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import gspo as art
from gspo.experiment.rollout import Scenario
from gspo.policy.embedded import build_model, build_tokenizer

textworld = import_module("textworld")
generator = import_module("textworld.generator.game")
inform7 = import_module("textworld.generator.inform7")

FOLDER = Path(os.environ.get("GSPO_ADVENTURES", ".gspo/adventures"))
GAMES = {"train": range(160), "heldout": range(160, 220)}
MOST_TURNS = 6
IDLE = ("examine", "inventory", "look", "close", "drop", "insert")


def make_game(number: int) -> tuple[Any, str, str]:
    """Game `number`, the thing that is wanted, and the table that it belongs on."""
    rng, maker = random.Random(number), textworld.GameMaker()
    west, east = maker.new_room("west room"), maker.new_room("east room")
    maker.connect(west.east, east.west)
    maker.set_player(rng.choice([west, east]))
    box = maker.new(type="c", name=rng.choice(["box", "bag", "case"]))
    box.add_property("closed")
    rng.choice([west, east]).add(box)
    things = [maker.new(type="o", name=n) for n in rng.sample(["pear", "fig", "cup", "hat"], 2)]
    box.add(*things)
    tables = [maker.new(type="s", name=n) for n in rng.sample(["mat", "shelf", "desk"], 2)]
    for table, room in zip(tables, rng.sample([west, east], 2), strict=True):
        room.add(table)
    wanted = (("in", things[0], maker.inventory), ("on", things[0], tables[0]))
    facts = (maker.new_fact(*fact) for fact in wanted)
    maker.quests = [
        generator.Quest(win_events=[generator.Event(conditions={fact})], reward=1) for fact in facts
    ]
    return maker.build(), things[0].name, tables[0].name


@cache
def load(number: int) -> tuple[Any, Any]:
    """A game, and what names its actions."""
    game = textworld.Game.load(str(FOLDER / f"{number}.json"))
    return game, inform7.Inform7Game(game)


class Adventure:
    """One game as it is played: TextWorld's rules, without its interpreter of text."""

    def __init__(self, number: int):
        self.goal: tuple[str, str] = tuple(json.loads((FOLDER / f"{number}.goal").read_text()))
        self._game, self._names = load(number)
        self._state, self._open = self._game.world.state.copy(), list(self._game.quests)
        self._look()

    @property
    def done(self) -> bool:
        """Whether each point has been made."""
        return not self._open

    @property
    def choices(self) -> int:
        """How many commands are possible now."""
        return len(self._actions)

    def _look(self) -> None:
        """See what is possible now, without what changes nothing."""
        kb = self._game.kb
        found = self._state.all_applicable_actions(kb.rules.values(), kb.types.constants_mapping)
        actions = list(found)
        named = zip(self._names.gen_commands_from_actions(actions), actions, strict=True)
        useful = {c: action for c, action in named if not c.startswith(IDLE)}
        self._actions = {command: useful[command] for command in sorted(useful)}

    def do(self, letter: str) -> float:
        """Take the command of a letter; what it earned, of 1 in all. Other texts change nothing."""
        chosen = dict(zip(ascii_lowercase, self._actions.values(), strict=False)).get(letter)
        if chosen is None:
            return 0.0
        self._state.apply(chosen)
        self._look()
        made = [q for q in self._open if self._state.is_applicable(q.win_events[0].condition)]
        self._open = [quest for quest in self._open if quest not in made]
        return len(made) / len(self._game.quests)

    def expert(self) -> str:
        """The letter of somebody who knows how."""
        thing, table = self.goal
        ranks = (f"put {thing} on {table}", f"take {thing}", "open", "go")
        commands = list(enumerate(self._actions))
        rated = [(ranks.index(r), k) for k, c in commands for r in ranks if c.startswith(r)]
        return ascii_lowercase[min(rated)[1]]

    def told(self, first: bool) -> str:
        """What the model is told before a turn."""
        listed = ";".join(map(" ".join, zip(ascii_lowercase, self._actions, strict=False)))
        return (f"{self.goal[0]} to {self.goal[1]}:" if first else "") + listed


async def rollout(model: art.TrainableModel, scenario: Scenario) -> art.Trajectory:
    """Play one game; the reward is the share of its points, a turn's reward what it earned."""
    numbers = GAMES[scenario.split]
    game = Adventure(numbers[scenario.index % len(numbers)])
    trajectory = art.Trajectory(turn_rewards=[])
    say, client = trajectory.messages_and_choices.append, model.openai_client()
    earned: list[float] = []
    while not game.done and len(earned) < MOST_TURNS:
        say({"role": "user", "content": game.told(not earned)})
        response = await client.chat.completions.create(
            model=model.inference_name, messages=trajectory.messages(), max_tokens=4
        )
        say(response.choices[0])
        earned.append(game.do(response.choices[0].message.content or ""))
    trajectory.turn_rewards, trajectory.reward = earned, sum(earned)
    trajectory.metrics |= {"turns": len(earned), "won": game.done}
    return trajectory


def demonstrations(count: int, seed: int, skill: float) -> list[dict[str, Any]]:
    """Conversations of a player who knows how with probability `skill`, and else guesses."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        game, messages = Adventure(rng.choice(GAMES["train"])), []
        while not game.done and len(messages) < 2 * MOST_TURNS:
            guess = rng.choice(ascii_lowercase[: game.choices])
            letter = game.expert() if rng.random() < skill else guess
            messages += [{"role": "user", "content": game.told(not messages)}]
            messages += [{"role": "assistant", "content": letter}]
            game.do(letter)
        rows.append({"messages": messages})
    return rows


def main() -> None:
    """Make what is not there yet: games, demonstrations, and a model that has learned nothing."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for number in (*GAMES["train"], *GAMES["heldout"]):
        if not (FOLDER / f"{number}.goal").exists():
            game, thing, table = make_game(number)
            game.save(str(FOLDER / f"{number}.json"))
            (FOLDER / f"{number}.goal").write_text(json.dumps([thing, table]))
    rows = demonstrations(1600, seed=0, skill=0.5)
    (FOLDER / "demonstrations.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    build_model(context=1024).save_pretrained(FOLDER / "untrained")
    build_tokenizer().save_pretrained(FOLDER / "untrained")


if __name__ == "__main__":
    main()
