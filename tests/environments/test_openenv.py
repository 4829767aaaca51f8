"""Against a stand-in that speaks OpenEnv's messages over a real socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from threading import Thread

import pytest

pytest.importorskip("websockets")
from websockets.sync.server import ServerConnection, serve

import gspo as art
from gspo.core.errors import ConfigError, RolloutError
from gspo.environments import Action, load_environment
from gspo.environments.play import play


def echo(socket: ServerConnection) -> None:
    """Counts to its seed, and ends there."""
    count = limit = 0
    for message in socket:
        asked = json.loads(message)
        data, kind = asked["data"], asked["type"]
        if kind == "reset":
            count, limit = 0, data["seed"]
            told = {"echo": f"{data.get('task', 'count')} to {limit}"}
        elif "message" not in data:
            socket.send(json.dumps({"type": "error", "data": {"code": "VALIDATION_ERROR"}}))
            continue
        else:
            count += data["message"] == str(count + 1)
            told = {"echo": data["message"]}
        reward, done = (None if kind == "reset" else count / 2), count == limit
        data = {"observation": told, "reward": reward, "done": done}
        socket.send(json.dumps({"type": "observation", "data": data}))


@pytest.fixture
def url() -> Iterator[str]:
    with serve(echo, "127.0.0.1", 0) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join()


async def test_an_episode_is_a_session_of_the_server(url: str):
    make = load_environment(f"openenv:{url}", {"observation": "echo", "reset": {"task": "go"}})
    words = iter(["1", "2"])
    async with art.FakeBackend(lambda prompt, index: next(words)) as backend:
        model = art.TrainableModel(name="fake", project="test", base_model="anything")
        await model.register(backend)
        t = await play(make(), model, 2)
    assert [m["content"] for m in t.messages()] == ["go to 2", "1", "1", "2"]
    assert (t.reward, t.metrics["turns"], t.metrics["cut_off"]) == (1.5, 2, False)


def test_all_of_an_observation_is_shown_as_json(url: str):
    environment = load_environment(f"openenv:{url}")()
    assert json.loads(environment.reset(5)) == {"echo": "count to 5"}
    assert environment.instance(5) is None
    environment.close()
    environment.close()


def test_mistakes_are_named(url: str):
    with pytest.raises(ConfigError, match="give the server's URL"):
        load_environment("openenv:localhost")
    with pytest.raises(RolloutError, match=r"no OpenEnv server answers at http://127.0.0.1:9"):
        load_environment("openenv:http://127.0.0.1:9")().reset(0)
    wrong = load_environment(f"openenv:{url}", {"action": "text"})()
    wrong.reset(0)
    with pytest.raises(RolloutError, match=r"answers a step with .*VALIDATION_ERROR"):
        wrong.step(Action("1"))
    wrong.close()
    other = load_environment(f"openenv:{url}", {"observation": "text"})()
    with pytest.raises(RolloutError, match=r"no field 'text'; there are \['echo'\]"):
        other.reset(0)
    other.close()
