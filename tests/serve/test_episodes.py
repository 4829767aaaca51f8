"""Episodes: recorded in process and by URL, by one server, and bounded."""

from __future__ import annotations

import threading
from typing import Any

import fastapi
import pytest
from openai import APIStatusError, AsyncOpenAI, BadRequestError, RateLimitError

from gspo.core.errors import ConfigError
from gspo.serve import episodes
from gspo.serve.app import create_app, one_engine
from gspo.serve.episodes import Episode, Episodes, current, recording
from gspo.serve.fake_engine import FakeEngine
from gspo.serve.refusals import Refusal
from gspo.serve.server import in_process_client
from serve.episode_client import HI, names, of, send
from support import choice


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
    with pytest.raises(Refusal, match="no episode 'b' here"):
        app.state.episodes.find("b")
    assert not app.state.episodes._episodes


def test_draws_depend_on_the_episode():
    assert Episode(id="a").purpose == ("episode", "a")
    assert Episode(id="a", purpose=("train", 3)).purpose == ("train", 3)


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


def test_current_asks_which_server():
    app = create_app(one_engine(FakeEngine(), names), names)
    assert current(app) is None
    with recording(episode := Episode()):
        assert current(app) is episode
        assert current(create_app(one_engine(FakeEngine(), names), names)) is None
