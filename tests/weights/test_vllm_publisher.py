"""Requests reach servers that were proved, whatever becomes of the others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo.core.errors import ConfigError, ServeError
from gspo.policy.load import Policy, load_policy
from gspo.weights import vllm_publisher, vllm_server
from gspo.weights.vllm_publisher import VllmPublisher, VllmServers, check_entries
from vllm_stand_in import PARAMS, StandIn


class Street:
    """Two servers, and a publisher to them."""

    def __init__(self, folder: Path, *entries: str):
        self.policy: Policy = load_policy("embedded:sort")
        self.folder = folder
        self.servers = VllmServers(entries, folder)
        self.publisher = VllmPublisher(self.servers, self.policy, folder, torch.float32)

    def publish(self, factor: float = 1.0) -> None:
        with torch.no_grad():
            next(self.policy.lm.parameters()).mul_(factor)
        self.policy.version += 1
        self.publisher.publish(self.policy)

    async def sample(self, **params: Any) -> int:
        asked = self.servers.ask(self.servers.sample([1, 2, 3], PARAMS | params))
        return (await asyncio.wrap_future(asked))[0]

    def samples(self, count: int) -> list[int]:
        async def together() -> list[int]:
            return await asyncio.gather(*(self.sample() for _ in range(count)))

        return asyncio.run(together())


@pytest.fixture(scope="module")
def pair() -> list[StandIn]:
    return [StandIn("embedded:sort"), StandIn("embedded:sort")]


@pytest.fixture
def street(
    pair: list[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Street]:
    monkeypatch.setattr(vllm_server, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(vllm_server, "HEALTH_SECONDS", 0.5)
    monkeypatch.setattr(vllm_publisher, "DOWN_SECONDS", 3.0)
    with ExitStack() as stack:
        for server in pair:
            server.faults.clear()
            server.restart()
            server.seconds = 0.0
        street = Street(tmp_path, *(stack.enter_context(server.listening()) for server in pair))
        try:
            yield street
        finally:
            street.servers.close()


def generated(server: StandIn) -> int:
    return server.asked.count("/inference/v1/generate")


def test_load_is_even_and_folders_are_let_go_of(street: Street, pair: list[StandIn]):
    for _ in range(3):
        street.publish(1.01)
    for server in pair:
        server.asked.clear()
    assert set(street.samples(8)) == {street.policy.version}
    assert [generated(server) for server in pair] == [4, 4]
    folders = sorted(path.name for path in street.folder.glob("gspo-*"))
    assert [name.rpartition("-")[2] for name in folders] == ["2", "3"]
    assert all((street.folder / name / "READY").read_text() == name for name in folders)
    assert street.publisher.tolerance == pytest.approx(1e-4)


@pytest.mark.parametrize("fault", ["dead", "hung", "restarted"])
def test_a_server_that_fails_costs_retries(
    fault: str, street: Street, pair: list[StandIn], caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING)
    street.publish(1.01)
    first = pair[0]
    if fault == "restarted":
        first.restart()
    else:
        first.faults |= {"dead"} if fault == "dead" else {"hangs", "hung health"}
    assert street.samples(4) == [1] * 4
    assert "asked again elsewhere" in caplog.text
    first.faults.clear()

    async def back() -> None:
        for _ in range(100):
            if street.servers.servers[0].publication is not None:
                return
            await asyncio.sleep(0.1)
        raise AssertionError(street.servers.servers[0].fault)

    asyncio.run(back())
    assert first.label == pair[1].label
    first.asked.clear()
    assert street.samples(4) == [1] * 4
    assert generated(first) == 2


def test_no_server_is_an_error_in_time(street: Street, pair: list[StandIn]):
    street.publish()
    for server in pair:
        server.faults.add("dead")
    with pytest.raises(ServeError, match=r"no vLLM server can be used: .*HTTP 500.*; .*HTTP 500"):
        street.samples(1)


def test_weights_that_do_not_arrive_stop_the_run(street: Street, pair: list[StandIn]):
    street.publish()
    pair[1].faults.add("old head")
    with pytest.raises(ServeError, match="does not compute with version 2"):
        street.publish(1.05)


def test_one_dead_server_does_not_stop_a_publication(street: Street, pair: list[StandIn]):
    street.publish()
    pair[1].faults.add("dead")
    street.publish(1.01)
    assert street.samples(3) == [2] * 3
    pair[0].faults.add("dead")
    with pytest.raises(ServeError, match="HTTP 500"):
        street.publish(1.01)


def test_what_runs_too_long_is_sampled_again_with_the_new_weights(
    street: Street, pair: list[StandIn], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(vllm_publisher, "DRAIN_SECONDS", 0.1)
    street.publish()
    for server in pair:
        server.faults.add("hangs")

    async def across() -> int:
        running = asyncio.create_task(street.sample())
        await asyncio.sleep(0.2)
        for server in pair:
            server.faults.clear()
        await asyncio.to_thread(street.publish, 1.01)
        return await running

    assert asyncio.run(across()) == 2


def test_a_request_can_be_cancelled(street: Street, pair: list[StandIn]):
    street.publish()
    pair[0].seconds = pair[1].seconds = 5.0

    async def cancelled() -> None:
        running = asyncio.create_task(street.sample())
        await asyncio.sleep(0.2)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await asyncio.sleep(0.1)

    asyncio.run(cancelled())
    assert [server.running for server in street.servers.servers] == [0, 0]


def test_a_closed_street_answers_at_once(street: Street):
    street.publish()
    street.servers.close()
    street.servers.close()


@pytest.mark.parametrize("entry", ["", "no-such-python", "ftp://host", "/nowhere/bin/python -x", 5])
def test_what_is_no_server_is_refused(entry: Any):
    with pytest.raises(ConfigError, match=r"engines: .*give each server's URL"):
        check_entries([entry])
    with pytest.raises(ConfigError, match=r"engines: .*give each server's URL"):
        check_entries(entry)
    with pytest.raises(ConfigError, match="URL once"):
        check_entries(["http://a:1", "http://a:1"])


def test_entries_may_be_one_text():
    assert check_entries("http://a:1") == ("http://a:1",)
    assert check_entries(["env A=1 python3 --x"] * 2) == ("env A=1 python3 --x",) * 2
