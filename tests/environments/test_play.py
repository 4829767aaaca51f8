"""What plays an episode: turns, tools, limits, errors, seeds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

import gspo as art
from environments.scripted import Broken, Guess, Shop, Slow, Stuck
from gspo.core.errors import DataError, RolloutError, RolloutTimeoutError
from gspo.environments import Action, Call, Step, load_environment
from gspo.environments.play import episode_seed, play
from gspo.tasks.task import held_out


@pytest.fixture
async def playing() -> AsyncIterator[Callable[..., Any]]:
    """Play an environment with a model that gives these answers in turn."""
    backends: list[art.FakeBackend] = []

    async def playing(environment: Any, *answers: str, seed: int = 0, **limits: Any):
        said = iter(answers)
        backend = art.FakeBackend(lambda prompt, index: next(said))
        backends.append(backend)
        model = art.TrainableModel(name="fake", project="test", base_model="anything")
        await model.register(backend)
        return await play(environment, model, seed, **limits)

    yield playing
    for backend in backends:
        await backend.close()


def number_of(seed: int, most: int = 8) -> int:
    environment = Guess(most)
    environment.reset(seed)
    return environment.number


async def test_environment_and_model_take_turns(playing: Any):
    right, environment = str(number_of(5)), Guess(cost=0.25)
    t = await playing(environment, "0", "9", right, "never", seed=5)
    assert [m["content"] for m in t.messages()] == [
        "Guess.",
        "1 to 8?",
        "0",
        "No.",
        "9",
        "No.",
        right,
    ]
    assert [m["role"] for m in t.messages()[:3]] == ["system", "user", "assistant"]
    assert len(t.choices()) == 3
    assert t.reward == 0.25
    assert t.turn_rewards == [-0.25, -0.25, 0.75]
    assert (t.metrics["turns"], t.metrics["cut_off"], t.metrics["right"]) == (3, False, True)
    assert t.metadata["seed"] == 5
    assert environment.closed == 1


async def test_an_episode_ends_after_the_most_turns(playing: Any):
    t = await playing(Guess(), *"0000")
    assert (t.metrics["turns"], t.metrics["cut_off"]) == (4, True)
    t = await playing(Guess(), "0", "0", max_turns=1)
    assert t.metrics["turns"] == 1


async def test_an_episode_ends_where_the_context_does(playing: Any):
    class Talker(Guess):
        def step(self, action: Action):
            return super().step(action).__class__("long " * 500)

    t = await playing(Talker(), *"0000")
    assert (t.metrics["turns"], t.metrics["cut_off"]) == (2, True)
    with pytest.raises(
        DataError, match=r"Guess \(seed 0, turn 1\): the engine refuses it: .*context"
    ):
        await playing(Guess(), max_tokens=5000)


async def test_calls_are_answered_one_by_one(playing: Any):
    calls = [
        f'<tool_call>{{"name": "price", "arguments": {{"of": "{thing}"}}}}</tool_call>'
        for thing in ("tea", "salt")
    ]
    shop = Shop()
    t = await playing(shop, "".join(calls), "Thanks.")
    assert list(shop.seen[0].calls) == [Call("price", {"of": "tea"}), Call("price", {"of": "salt"})]
    assert shop.seen[1] == Action("Thanks.", [])
    roles = [(m["role"], m.get("content")) for m in t.messages()]
    assert roles[2:4] == [("tool", "tea: 3"), ("tool", "salt: 3")]
    assert t.tools == Shop.tools
    assert t.reward == 1.0


async def test_an_environment_may_be_async(playing: Any):
    t = await playing(Slow(), str(number_of(0)))
    assert t.reward == 1
    assert await episode_seed(Slow, "train", 0) == await episode_seed(Slow, "train", 0)


async def test_an_environment_that_hangs_is_named_and_ended(playing: Any):
    began, environment = time.monotonic(), Stuck()
    with pytest.raises(RolloutTimeoutError, match=r"Stuck \(seed 3, turn 1\): step .* 0.2 s"):
        await playing(environment, "0", seed=3)
    assert time.monotonic() - began < 2
    for _ in range(100):
        if Stuck.ended:
            break
        await asyncio.sleep(0.02)
    assert Stuck.ended, "its thread goes on"
    assert not environment.closed  # its thread was in it

    class Asleep(Guess):
        async def step(self, action: Action):
            await asyncio.sleep(60)

    with pytest.raises(RolloutTimeoutError, match="Asleep"):
        await playing(Asleep(), "0", step_timeout=0.05)


@pytest.mark.parametrize(
    ("way", "kind", "message"),
    [
        ("raise", RolloutError, r"step raised KeyError: 'lamp' \(.*scripted.py, line \d+\)"),
        ("exit", RolloutError, "step raised SystemExit: 1"),
        ("none", DataError, r"step returned None \(NoneType\); it must return a Step"),
        ("text", DataError, r"step returned 'text' \(str\); it must return a Step"),
        ("number", DataError, r"the step's text is 17 \(int\); it must be a text$"),
        ("metric", DataError, r"metrics\['score'\] is 'high' \(str\); it must be a number"),
        ("nan", DataError, r"the reward is nan \(float\); it must be a finite number"),
    ],
)
async def test_mistakes_of_an_environment_are_named(
    playing: Any, way: str, kind: type[Exception], message: str
):
    environment = Broken(way)
    with pytest.raises(kind, match=rf"Broken \(seed 0, turn 1\): {message}"):
        await playing(environment, "0")
    assert environment.closed == 1


async def test_an_opening_and_the_answers_to_calls_must_be_texts(playing: Any):
    class Mute(Shop):
        def reset(self, seed: int) -> Any:
            return None

        def step(self, action: Action) -> Step:
            return Step(["one"])

    with pytest.raises(DataError, match=r"turn 0\): reset returned None .* must return a text"):
        await playing(Mute(), "0")
    Mute.reset = Shop.reset
    call = '<tool_call>{"name": "price", "arguments": {}}</tool_call>'
    with pytest.raises(DataError, match=r"text is \['one'\] .* or a list of 2, one for each call"):
        await playing(Mute(), call * 2)


async def test_its_own_time_limit_is_no_hang(playing: Any):
    class Impatient(Guess):
        def step(self, action: Action):
            raise TimeoutError("the shop is closed")

    with pytest.raises(RolloutError, match="raised TimeoutError: the shop is closed") as caught:
        await playing(Impatient(), "0")
    assert not isinstance(caught.value, RolloutTimeoutError)


async def test_no_instance_is_in_both_splits():
    make = load_environment(f"{__package__}.scripted:Guess", {"most": 40})
    numbers: dict[str, set[int]] = {}
    for split in ("train", "heldout"):
        seeds = [await episode_seed(make, split, index) for index in range(30)]
        numbers[split] = {number_of(seed, 40) for seed, _ in seeds}
        assert len({name for _, name in seeds}) == len(numbers[split])
        assert all(held_out(str(n)) == (split == "heldout") for n in numbers[split])
    assert len(numbers["train"]) > 10
    assert not numbers["train"] & numbers["heldout"]


async def test_a_seed_depends_on_its_numbers_alone():
    first = await episode_seed(Guess, "train", 3, seed=1)
    assert first == await episode_seed(Guess, "train", 3, seed=1)
    assert first[0] != (await episode_seed(Guess, "train", 4, seed=1))[0]
    assert first[0] != (await episode_seed(Guess, "train", 3, seed=2))[0]


async def test_too_few_instances_are_refused_and_none_are_not_told_apart():
    with pytest.raises(DataError, match="Guess: no heldout instance in 1000 draws"):
        await episode_seed(lambda: Guess(1), "heldout", 0)

    class Unknown(Guess):
        def instance(self, seed: int):
            return None

    assert (await episode_seed(Unknown, "heldout", 0))[1] is None
