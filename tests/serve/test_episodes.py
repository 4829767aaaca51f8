"""Episodes: by URL and in process, read, rewarded, dropped, and bounded."""

from __future__ import annotations

import threading
from typing import Any

import fastapi
import pytest
from openai import APIStatusError, AsyncOpenAI, BadRequestError, RateLimitError

import gspo as art
from gspo.core.errors import ConfigError
from gspo.serve import episodes
from gspo.serve.app import create_app, one_engine
from gspo.serve.episodes import Episode, Episodes, current, current_episode, recording
from gspo.serve.fake_engine import FakeEngine
from gspo.serve.server import in_process_client
from gspo.trajectories import Trajectory
from support import choice

HI: Any = [{"role": "user", "content": "hi"}]


def names() -> list[str]:
    return ["m"]


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


def of(client: AsyncOpenAI, id: str) -> AsyncOpenAI:
    return client.with_options(base_url=f"http://gspo.local/episodes/{id}/v1")


async def send(client: AsyncOpenAI, method: str, path: str, **body: Any) -> Any:
    content: Any = {"json": body} if body else {}
    return await client._client.request(method, f"http://gspo.local/episodes/{path}", **content)


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


async def test_a_request_that_fails_records_nothing(client: AsyncOpenAI):
    with pytest.raises(APIStatusError):
        await of(client, "x").chat.completions.create(model="other", messages=HI)
    assert (await send(client, "GET", "x")).json()["messages_and_choices"] == []


async def test_number_tokens_and_age_are_bounded(
    client: AsyncOpenAI, app: fastapi.FastAPI, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(episodes, "MOST_EPISODES", 2)
    for id in ("a", "b", "a"):
        await of(client, id).chat.completions.create(model="m", messages=HI)
    with pytest.raises(RateLimitError, match="DELETE /episodes/<id>"):
        await of(client, "c").chat.completions.create(model="m", messages=HI)
    await send(client, "DELETE", "a")
    await of(client, "c").chat.completions.create(model="m", messages=HI)
    monkeypatch.setattr(episodes, "MOST_TOKENS", 10)
    with pytest.raises(RateLimitError, match="with 10"):
        await of(client, "b").chat.completions.create(model="m", messages=HI)
    monkeypatch.setattr(episodes, "IDLE_SECONDS", -1)
    assert app.state.episodes.find("b") is None
    assert not app.state.episodes._episodes


def test_draws_depend_on_the_episode():
    assert Episode(id="a").purpose == ("episode", "a")
    assert Episode(id="a", purpose=("train", 3)).purpose == ("train", 3)


async def test_requests_of_an_episode_draw_for_it(client: AsyncOpenAI, engine: FakeEngine):
    await of(client, "a").chat.completions.create(model="m", messages=HI)
    await client.chat.completions.create(model="m", messages=HI)
    purposes = [request.params.purpose for request in engine.requests]
    assert purposes == [("episode", "a"), ()]
    assert current_episode() is None


async def test_calls_of_this_process_are_recorded_in_its_episode(client: AsyncOpenAI):
    episode = Episode()
    with recording(episode):
        answer = await client.chat.completions.create(model="m", messages=HI)
        with recording(None):
            await client.chat.completions.create(model="m", messages=HI)
        # What the URL says comes first.
        await of(client, "x").chat.completions.create(model="m", messages=HI)
    await client.chat.completions.create(model="m", messages=HI)
    assert [h.choices() for h in episode.trajectory.histories()] == [answer.choices]


async def test_only_one_server_is_recorded(app: fastapi.FastAPI, client: AsyncOpenAI):
    other = in_process_client(create_app(one_engine(FakeEngine(), names), names))
    episode = Episode()
    with recording(episode):
        mine = await client.chat.completions.create(model="m", messages=HI)
        await other.chat.completions.create(model="m", messages=HI)
    assert episode.trajectory.choices() == mine.choices
    with pytest.raises(ConfigError, match="another model"):
        Episodes().add(episode)
    await other.close()


async def test_an_episode_that_has_ended_takes_nothing(
    app: fastapi.FastAPI, client: AsyncOpenAI, caplog: pytest.LogCaptureFixture
):
    episode = Episode()
    app.state.episodes.add(episode)
    await of(client, episode.id).chat.completions.create(model="m", messages=HI)
    with recording(episode):
        episode.end()
        await client.chat.completions.create(model="m", messages=HI)
    assert "had ended" in caplog.text
    assert len(episode.trajectory.choices()) == 1
    with pytest.raises(BadRequestError, match="has ended"):
        await of(client, episode.id).chat.completions.create(model="m", messages=HI)


def test_what_is_recorded_is_not_the_callers_own():
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    episode = Episode()
    episode.record(messages, tools, choice([1]).model_dump())
    messages[0]["content"][0]["text"] = tools[0]["function"]["name"] = "changed"  # pyright: ignore
    before = episode.so_far()
    episode.record(messages, tools, choice([2]).model_dump())
    assert "changed" not in before.model_dump_json()
    assert before.tools and before.tools[0]["function"]["name"] == "f"


def test_threads_may_record_at_once():
    episode = Episode()

    def work(name: int) -> None:
        messages: list[Any] = []
        for turn in range(20):
            messages.append({"role": "user", "content": f"{name}/{turn}"})
            episode.record(messages, None, choice([name], [turn]).model_dump())
            messages.append({"role": "assistant", "content": "x"})

    threads = [threading.Thread(target=work, args=[i]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(h.choices()) for h in episode.trajectory.histories()] == [20] * 4
    assert episode.tokens == 4 * 20 * 2


def test_the_document_names_the_routes_of_episodes(app: fastapi.FastAPI):
    paths = app.openapi()["paths"]
    assert {"/episodes/{episode}", "/episodes/{episode}/reward"} <= set(paths)
    (parameter,) = paths["/episodes/{episode}/v1/chat/completions"]["post"]["parameters"]
    assert (parameter["name"], parameter["in"]) == ("episode", "path")


def test_current_asks_which_server():
    app = create_app(one_engine(FakeEngine(), names), names)
    assert current(app) is None
    with recording(episode := Episode()):
        assert current(app) is episode
        assert current(create_app(one_engine(FakeEngine(), names), names)) is None


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
