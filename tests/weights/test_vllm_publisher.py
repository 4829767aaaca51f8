"""Requests reach servers that were proved, whatever becomes of the others."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from gspo.core.errors import RequestError, ServeError
from gspo.policy.embedded import build_tokenizer
from gspo.policy.load import Policy, load_policy, whole_weights_to_store
from gspo.weights import vllm_http, vllm_publisher, vllm_server
from gspo.weights.vllm_publisher import VllmPublisher, VllmServers
from vllm_stand_in import PARAMS, StandIn


class Street:
    """Two servers, and a publisher to them."""

    def __init__(self, policy: Policy, folder: Path, *entries: str):
        self.policy, self.folder = policy, folder
        self.servers = VllmServers(entries, folder)
        self.publisher = VllmPublisher(self.servers, policy, torch.float32)

    def publish(self, factor: float = 1.0) -> None:
        with torch.no_grad():
            next(self.policy.lm.parameters()).mul_(factor)
        self.policy.version += 1
        self.publisher.publish(self.policy)

    async def sample(self, **params: Any) -> int:
        """The version of the weights that have sampled."""
        sampled = self.servers.sample([1, 2, 3], PARAMS | params, lambda _, version: version)
        return await asyncio.wrap_future(self.servers.ask(sampled))

    def samples(self, *counts: int) -> list[int]:
        async def together() -> list[int]:
            return await asyncio.gather(*(self.sample(n=n) for n in counts))

        return asyncio.run(together())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dense model of one layer, with a tied head."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), build_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pair(model: str) -> list[StandIn]:
    return [StandIn(model), StandIn(model)]


@pytest.fixture(scope="module")
def urls(pair: list[StandIn]) -> Iterator[list[str]]:
    with ExitStack() as stack:
        yield [stack.enter_context(server.listening()) for server in pair]


@pytest.fixture(scope="module")
def loaded(model: str) -> tuple[Policy, dict[str, torch.Tensor]]:
    policy = load_policy(model)
    return policy, {name: weight.clone() for name, weight in policy.lm.state_dict().items()}


@pytest.fixture
def street(
    pair: list[StandIn],
    urls: list[str],
    loaded: tuple[Policy, dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Street]:
    monkeypatch.setattr(vllm_server, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(vllm_server, "HEALTH_SECONDS", 2.0)
    monkeypatch.setattr(vllm_http, "AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(vllm_publisher, "DOWN_SECONDS", 10.0)
    monkeypatch.setattr(vllm_publisher, "_BACKOFF", 0.05)
    for server in pair:
        server.faults.clear()
        server.restart()
        server.seconds = 0.0
    policy, weights = loaded
    policy.lm.load_state_dict(weights)
    policy.version = 0
    street = Street(policy, tmp_path, *urls)
    try:
        yield street
    finally:
        street.servers.close()


def generated(server: StandIn) -> int:
    return server.asked.count("/inference/v1/generate")


def until(holds: Callable[[], bool]) -> None:
    async def poll() -> None:
        while not holds():
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(poll(), 30))


def test_load_is_even_and_folders_are_let_go_of(street: Street, pair: list[StandIn]):
    for _ in range(3):
        street.publish(1.01)
    for server in pair:
        server.asked.clear()
    assert set(street.samples(*[1] * 8)) == {street.policy.version}
    assert [generated(server) for server in pair] == [4, 4]
    street.samples(3, 1, 1, 1)  # completions count, not requests
    assert [generated(server) for server in pair] == [5, 7]
    folders = sorted(path.name for path in street.folder.glob("gspo-*"))
    assert [name.rpartition("-")[2] for name in folders] == ["2", "3"]
    assert all((street.folder / name / "READY").read_text() == name for name in folders)
    assert street.publisher.tolerance == pytest.approx(1e-4)
    street.servers.close()
    assert not list(street.folder.iterdir())


def test_whole_weights_are_let_go_of_before_servers_read(
    street: Street, monkeypatch: pytest.MonkeyPatch
):
    """A machine that has both needs its memory for the servers then."""
    made, held, publish = [], [], street.servers.publish

    def copied(policy: Policy) -> dict[str, torch.Tensor]:
        whole = {name: weight.clone() for name, weight in whole_weights_to_store(policy).items()}
        made.extend(weakref.ref(weight) for weight in whole.values())
        return whole

    def published(new: Any) -> Any:
        held.extend(ref() for ref in made)
        return publish(new)

    monkeypatch.setattr(vllm_publisher, "whole_weights_to_store", copied)
    monkeypatch.setattr(street.servers, "publish", published)
    street.publish()
    assert len(held) > len(made) > 0 == sum(weight is not None for weight in held)


def test_what_a_killed_run_has_left_is_removed(street: Street):
    for name in ("gspo-0123-4/model", ".gspo-0123-5.77.tmp/model", "notes", "vllm-0.log"):
        (street.folder / name).parent.mkdir(exist_ok=True)
        (street.folder / name).touch()
    VllmServers(["http://127.0.0.1:9"], street.folder).close()
    assert sorted(path.name for path in street.folder.iterdir()) == ["notes", "vllm-0.log"]


def test_the_first_publication_shows_whether_servers_can_reload(
    street: Street, pair: list[StandIn]
):
    before = {name: weight.clone() for name, weight in street.policy.lm.state_dict().items()}
    pair[0].faults.add("old head")
    with pytest.raises(ServeError, match="does not compute with version 1 of the weights"):
        street.publish()
    after = street.policy.lm.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_what_is_allowed_is_measured_once(street: Street, monkeypatch: pytest.MonkeyPatch):
    street.publish()
    first = street.publisher._first
    assert first == 0.0  # the stand-in computes as the trainer does
    assert street.publisher.tolerance < 1e-2
    street.publisher._first = 1e-6
    monkeypatch.setattr(vllm_publisher, "_MARGIN", 50.0)
    street.publish(1.01)
    assert street.publisher._first == 1e-6
    largest = max(map(abs, street.servers.farthest.scores))
    assert street.publisher.tolerance == pytest.approx(max(1e-4, 50e-6 * largest), rel=1e-3)
    street.publisher._first = 1.0
    street.publish(1.01)
    largest = max(map(abs, street.servers.farthest.scores))
    assert street.publisher.tolerance == pytest.approx(1e-4 * largest, rel=1e-3)


@pytest.mark.parametrize("fault", ["dead", "hung", "restarted", "abort", "begins anew"])
def test_a_server_that_fails_costs_retries(
    fault: str, street: Street, pair: list[StandIn], caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING)
    street.publish(1.01)
    first = pair[0]
    if fault == "restarted":
        first.restart()
    elif fault in ("abort", "begins anew"):
        first.faults.add(fault)
    else:
        first.faults |= {"dead"} if fault == "dead" else {"hangs", "hung health"}
    assert street.samples(*[1] * 4) == [1] * 4
    assert "asked again elsewhere" in caplog.text
    first.faults.clear()
    until(lambda: street.servers.servers[0].publication is not None)
    assert first.label.startswith(f"{street.servers.run}-1-")
    first.asked.clear()
    assert street.samples(*[1] * 4) == [1] * 4
    assert generated(first) == 2
    assert [server.running for server in street.servers.servers] == [0, 0]


def test_a_spoilt_answer_costs_no_other_one(
    street: Street, pair: list[StandIn], monkeypatch: pytest.MonkeyPatch
):
    """The server has its weights still: what else it samples keeps the label."""
    monkeypatch.setattr(vllm_server, "HEALTH_SECONDS", 60.0)
    street.publish(1.01)
    first = pair[0]
    label = first.label
    for server in pair:
        server.asked.clear()
        server.seconds = 0.2
    first.faults.add("abort")
    first.passing = True
    try:
        assert street.samples(*[1] * 12) == [1] * 12
    finally:
        first.passing = False
    until(lambda: street.servers.servers[0].publication is not None)
    assert first.label == label
    assert sum(map(generated, pair)) == 12 + 1 + 1  # one again, and the probe
    assert "/collective_rpc" not in first.asked


def test_a_late_fault_of_old_weights_takes_no_server_away(street: Street, pair: list[StandIn]):
    """A server that was mended while one of its requests still failed is not mended again."""
    street.publish()
    server = street.servers.servers[0]
    pair[0].faults |= {"hangs", "hung health"}
    pair[1].seconds = 0.5

    async def two() -> None:
        first = asyncio.create_task(street.sample())
        await asyncio.sleep(0.01)
        assert server.running == 1
        server.publication = None  # another request has found it
        pair[0].asked.clear()
        await first

    asyncio.run(two())
    assert "/collective_rpc" not in pair[0].asked
    assert not street.servers._repairs


def test_no_server_is_an_error_in_time(
    street: Street, pair: list[StandIn], monkeypatch: pytest.MonkeyPatch
):
    street.publish()
    monkeypatch.setattr(vllm_publisher, "DOWN_SECONDS", 0.3)
    for server in pair:
        server.faults.add("dead")
    with pytest.raises(ServeError, match=r"no vLLM server can be used: .*HTTP 500.*; .*HTTP 500"):
        street.samples(1)
    with pytest.raises(ServeError, match=r"no vLLM server can be used: .*HTTP 500"):
        street.publish()


def test_a_request_that_always_fails_is_given_up(street: Street, monkeypatch: pytest.MonkeyPatch):
    street.publish()
    monkeypatch.setattr(vllm_publisher, "TRIES", 3)

    async def fails(*_: Any) -> None:
        raise vllm_server.ServerFault("it fell over")

    for server in street.servers.servers:
        monkeypatch.setattr(server, "sample", fails)
    with pytest.raises(ServeError, match=r"a request failed 3 times, last: .*it fell over"):
        street.samples(1)


def test_what_a_server_refuses_is_asked_once(street: Street, pair: list[StandIn]):
    street.publish()
    for server in pair:
        server.asked.clear()
    with pytest.raises(RequestError, match="greedy"):
        asyncio.run(street.sample(n=2, temperature=0.0))
    assert sum(map(generated, pair)) == 1
    assert all(server.publication for server in street.servers.servers)


def test_weights_that_do_not_arrive_stop_the_run(street: Street, pair: list[StandIn]):
    street.publish()
    pair[1].faults.add("old head")
    with pytest.raises(ServeError, match="does not compute with version 2"):
        street.publish(1.05)


def test_a_second_server_with_other_weights_is_named(street: Street, pair: list[StandIn]):
    pair[1].faults.add("stale")
    with pytest.raises(ServeError, match="does not compute with version 1") as found:
        street.publish()
    assert street.servers.servers[1].url in str(found.value)


def test_dead_servers_do_not_stop_a_publication(street: Street, pair: list[StandIn]):
    pair[1].faults.add("dead")
    street.publish()
    street.publish(1.01)
    assert street.samples(1, 1, 1) == [2] * 3
    pair[0].faults.add("dead")

    async def later() -> None:
        publication = asyncio.create_task(asyncio.to_thread(street.publish, 1.01))
        await asyncio.sleep(0.2)
        assert not publication.done()
        pair[0].faults.clear()  # as after a restart of its machine
        await publication

    asyncio.run(later())
    assert street.samples(1) == [3]


def test_the_first_publication_needs_a_server_at_once(street: Street, pair: list[StandIn]):
    for server in pair:
        server.faults.add("dead")
    with pytest.raises(ServeError, match="HTTP 500"):
        street.publish()
    assert not street.servers._repairs


def test_a_server_may_fail_right_after_its_proof(
    street: Street, pair: list[StandIn], monkeypatch: pytest.MonkeyPatch
):
    """Then the scores of the proof are still there: the receipt asks for them."""
    street.publish()
    for server in street.servers.servers:
        server.publication = None
    assert len(street.servers.farthest.scores) == 126 and street.servers.farthest.distance < 1e-5


def test_what_is_being_sampled_is_waited_for(
    street: Street, pair: list[StandIn], caplog: pytest.LogCaptureFixture, monkeypatch: Any
):
    monkeypatch.setattr(vllm_publisher, "NOTICE_SECONDS", 0.05)
    street.publish()
    for server in pair:
        server.seconds = 0.3
        server.asked.clear()

    async def across() -> int:
        running = asyncio.create_task(street.sample())
        await asyncio.sleep(0.05)
        await asyncio.to_thread(street.publish, 1.01)
        return await running

    assert asyncio.run(across()) == 1
    assert sum(map(generated, pair)) == 1 + 2  # the two are of the probe
    assert "new weights wait for 1 requests" in caplog.text


def test_what_runs_too_long_is_sampled_again_with_the_new_weights(
    street: Street, pair: list[StandIn], monkeypatch: pytest.MonkeyPatch
):
    for name in ("NOTICE_SECONDS", "DRAIN_SECONDS"):
        monkeypatch.setattr(vllm_publisher, name, 0.05)
    street.publish()
    for server in pair:
        server.faults.add("hangs")

    async def across() -> int:
        running = asyncio.create_task(street.sample())
        await asyncio.sleep(0.05)
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
        await asyncio.sleep(0.05)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await asyncio.sleep(0.05)

    asyncio.run(cancelled())
    assert [server.running for server in street.servers.servers] == [0, 0]


def test_closing_fails_what_is_asked_and_what_is_asked_afterwards(
    street: Street, pair: list[StandIn]
):
    street.publish()
    for server in pair:
        server.faults |= {"hangs"}

    async def closed() -> None:
        asked = [asyncio.create_task(street.sample()) for _ in range(2)]
        await asyncio.sleep(0.05)
        street.servers.servers[0].publication = street.servers.servers[1].publication = None
        street.servers._changing = True
        asked += [asyncio.create_task(street.sample())]  # waits for a server
        await asyncio.sleep(0.05)
        assert street.servers.waiting == 1
        await asyncio.to_thread(street.servers.close)
        found = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 5)
        assert all("is closed" in str(error) and isinstance(error, ServeError) for error in found)

    asyncio.run(closed())
    with pytest.raises(ServeError, match="is closed"):
        street.samples(1)
    street.servers.close()


def test_what_closing_fails_is_not_told_of_those_who_left(street: Street, pair: list[StandIn]):
    street.publish()
    for server in pair:
        server.faults |= {"hangs"}
    said: list[str] = []
    street.servers.loop.set_exception_handler(lambda _, told: said.append(told["message"]))

    async def left() -> None:
        waits = street.servers.ask(street.servers.sample([1, 2, 3], PARAMS, lambda *_: None))
        await asyncio.sleep(0.05)
        street.servers._closed = True  # as `close` sets it, before the one that asked has gone
        waits.cancel()
        await asyncio.sleep(0.05)
        street.servers._closed = False

    asyncio.run(left())
    gc.collect()
    street.servers.close()
    assert said == []


def test_closing_ends_a_publication(street: Street, pair: list[StandIn]):
    street.publish()
    for server in pair:
        server.faults |= {"hangs"}  # the probe is not answered

    async def closed() -> None:
        publication = asyncio.create_task(asyncio.to_thread(street.publish, 1.01))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(street.servers.close)
        with pytest.raises(ServeError, match="is closed"):
            await asyncio.wait_for(publication, 5)

    asyncio.run(closed())
    assert not list(street.folder.iterdir())


def test_two_runs_on_one_server_cost_reloads_and_no_wrong_token(
    street: Street, urls: list[str], tmp_path: Path
):
    street.publish()
    other = Street(street.policy, tmp_path / "other", *urls)
    try:
        other.publish(1.5)
        assert other.samples(1) == [2]
        assert street.samples(1) == [1]
        assert other.samples(1) == [2]
    finally:
        other.servers.close()
