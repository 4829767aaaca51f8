"""The routes of episodes: a program captured by its URL; an episode read, rewarded, dropped."""

from __future__ import annotations

from typing import Any

import fastapi
import pytest
from openai import AsyncOpenAI, BadRequestError

import gspo as art
from gspo.serve.app import create_app, one_engine
from gspo.serve.episodes import current_episode
from gspo.serve.fake_engine import FakeEngine
from gspo.serve.server import in_process_client
from gspo.trajectories import Trajectory
from serve.episode_client import HI, names, of, send


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def app(engine: FakeEngine) -> fastapi.FastAPI:
    return create_app(one_engine(engine, names), names)


@pytest.fixture
async def client(app: fastapi.FastAPI):
    client = in_process_client(app)
    yield client
    await client.close()


async def test_a_program_is_captured_by_its_base_url_alone(client: AsyncOpenAI):
    agent = of(client, "task-1.a_~")
    first = await agent.chat.completions.create(model="m", messages=HI)
    messages: Any = [*HI, first.choices[0].message, {"role": "user", "content": "more"}]
    second = await agent.chat.completions.create(model="m", messages=messages)
    text = await agent.completions.create(model="m", prompt="once")
    await client.chat.completions.create(model="m", messages=HI)  # of no episode
    answer = await send(client, "GET", "task-1.a_~")
    trajectory = art.Trajectory(**answer.json())
    assert trajectory.choices() == [first.choices[0], second.choices[0]]
    (further,) = trajectory.additional_histories
    assert further.choices()[0].token_ids == text.choices[0].token_ids  # pyright: ignore


async def test_an_answer_that_was_begun_is_one_message(client: AsyncOpenAI):
    agent = of(client, "begun")
    begun: Any = {"role": "assistant", "content": "I am"}
    more: dict[str, Any] = {"continue_final_message": True}
    first = await agent.chat.completions.create(model="m", messages=[*HI, begun], extra_body=more)
    said = "I am" + (first.choices[0].message.content or "")
    messages: Any = [*HI, {"role": "assistant", "content": said}, *HI]
    second: Any = await agent.chat.completions.create(model="m", messages=messages)
    trajectory = art.Trajectory(**(await send(client, "GET", "begun")).json())
    assert not trajectory.additional_histories
    assert [m.get("content") for m in trajectory.messages()[:3]] == ["hi", said, "hi"]
    choices: Any = trajectory.choices()
    tokens = choices[0].prompt_token_ids + choices[0].token_ids
    assert second.choices[0].prompt_token_ids[: len(tokens)] == tokens


async def test_each_of_several_choices_is_recorded(client: AsyncOpenAI):
    agent = of(client, "many")
    answer = await agent.chat.completions.create(model="m", messages=HI, n=3)
    trajectory = art.Trajectory(**(await send(client, "GET", "many")).json())
    recorded: Any = [c for h in trajectory.histories() for c in h.choices()]
    given: Any = answer.choices
    assert [c.token_ids for c in recorded] == [c.token_ids for c in given]
    # The agent goes on with one of them, in that one's history.
    messages: Any = [*HI, answer.choices[2].message, *HI]
    await agent.chat.completions.create(model="m", messages=messages)
    trajectory = art.Trajectory(**(await send(client, "GET", "many")).json())
    assert [len(h.choices()) for h in trajectory.histories()] == [1, 1, 2]


async def test_a_reward_is_set_and_an_episode_dropped(client: AsyncOpenAI):
    await of(client, "x").chat.completions.create(model="m", messages=HI)
    answer = await send(client, "POST", "x/reward", reward=0.5)
    assert (answer.status_code, answer.json()) == (200, {"reward": 0.5})
    assert (await send(client, "GET", "x")).json()["reward"] == 0.5
    assert (await send(client, "DELETE", "x")).status_code == 200
    for method, path in (("GET", "x"), ("DELETE", "x")):
        answer = await send(client, method, path)
        assert answer.status_code == 404
        assert answer.json()["error"]["param"] == "episode"
    assert (await send(client, "POST", "x/reward", reward=1)).status_code == 404


@pytest.mark.parametrize("body", ['{"reward": "1"}', '{"reward": NaN}', '{"reward": 1e200}', "{}"])
async def test_a_reward_that_is_no_number_is_refused(client: AsyncOpenAI, body: str):
    await of(client, "x").chat.completions.create(model="m", messages=HI)
    url = "http://gspo.local/episodes/x/reward"
    headers = {"content-type": "application/json"}
    answer = await client._client.request("POST", url, content=body, headers=headers)
    assert answer.status_code == 400
    assert "reward" in answer.json()["error"]["message"]


@pytest.mark.parametrize("id", ["a%20b", "a" * 129, "%E4"])
async def test_an_id_that_is_no_url_safe_text_is_refused(client: AsyncOpenAI, id: str):
    with pytest.raises(BadRequestError, match="episode"):
        await of(client, id).chat.completions.create(model="m", messages=HI)


async def test_requests_of_an_episode_draw_for_it(client: AsyncOpenAI, engine: FakeEngine):
    await of(client, "a").chat.completions.create(model="m", messages=HI)
    await client.chat.completions.create(model="m", messages=HI)
    purposes = [request.params.purpose for request in engine.requests]
    assert purposes == [("episode", "a"), ()]
    assert current_episode() is None


def test_the_document_names_the_routes_of_episodes(app: fastapi.FastAPI):
    paths = app.openapi()["paths"]
    assert {"/episodes/{episode}", "/episodes/{episode}/reward"} <= set(paths)
    (parameter,) = paths["/episodes/{episode}/v1/chat/completions"]["post"]["parameters"]
    assert (parameter["name"], parameter["in"]) == ("episode", "path")


async def test_turn_rewards_are_one_for_each_turn(client: AsyncOpenAI):
    for _ in range(2):
        await of(client, "x").chat.completions.create(model="m", messages=HI)
    answer = await send(client, "POST", "x/reward", reward=1, turn_rewards=[0, 0.5])
    assert (answer.status_code, answer.json()) == (200, {"reward": 1.0, "turn_rewards": [0, 0.5]})
    read = Trajectory.model_validate((await send(client, "GET", "x")).json())
    assert (read.reward, read.turn_rewards, len(read.sampled_turns())) == (1.0, [0.0, 0.5], 2)
    for given in ([1.0], [0.0, 1e200], [0.0, "1"], 3):
        answer = await send(client, "POST", "x/reward", reward=9, turn_rewards=given)
        assert answer.status_code == 400
        assert "turn_rewards" in answer.json()["error"]["message"], given
    assert (await send(client, "GET", "x")).json()["reward"] == 1.0
