"""An answer in time, or an error that says what became of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from gspo.core.errors import RequestError
from gspo.weights import vllm_http
from gspo.weights.vllm_http import ServerFault, call, client
from vllm_stand_in import StandIn


@pytest.fixture(scope="module")
def listening() -> Iterator[tuple[StandIn, str]]:
    stand_in = StandIn("embedded:sort")
    with stand_in.listening() as url:
        yield stand_in, url


@pytest.fixture
def stand_in(listening: tuple[StandIn, str]) -> Iterator[StandIn]:
    yield listening[0]
    listening[0].faults.clear()
    listening[0].refusals.clear()
    listening[0].busy = 0


@pytest.fixture
def url(listening: tuple[StandIn, str]) -> str:
    return listening[1]


def answered(url: str, seconds: float = 10.0) -> Any:
    async def asked() -> Any:
        async with client(url) as http:
            done = await call(http, url, None, seconds)
            transport: Any = http._transport
            # The server may close it at the moment of its next use, which would look like its end.
            assert transport._pool.connections == []
            return done

    return asyncio.run(asked())


def test_no_connection_is_used_twice(url: str, stand_in: StandIn):
    assert answered(f"{url}/weight_info") == {"weight_version": stand_in.label}
    assert answered(f"{url}/health") is None


def test_a_busy_server_is_asked_again_and_not_for_ever(
    url: str, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
):
    stand_in.busy = 3
    assert answered(f"{url}/weight_info")
    assert stand_in.busy == 0
    monkeypatch.setattr(vllm_http, "BUSY_SECONDS", 0.3)
    stand_in.busy = 99
    with pytest.raises(ServerFault, match=r"/health: HTTP 503: .*scaling"):
        answered(f"{url}/health")
    with pytest.raises(ServerFault, match=r"/health: no answer within 0.1 s"):
        answered(f"{url}/health", 0.1)


def test_an_error_of_a_moment_is_asked_again(
    url: str, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(vllm_http, "AGAIN_SECONDS", 30.0)
    stand_in.failing = 2
    assert answered(f"{url}/weight_info")
    monkeypatch.setattr(vllm_http, "AGAIN_SECONDS", 0.2)
    stand_in.failing = 1
    with pytest.raises(ServerFault, match=r"/health: HTTP 502"):
        answered(f"{url}/health")


@pytest.mark.parametrize("fault", ["no json", "deep"])
def test_half_an_answer_is_a_fault(fault: str, url: str, stand_in: StandIn):
    stand_in.faults.add(fault)
    with pytest.raises(ServerFault, match=r"/v1/models: no JSON: "):
        answered(f"{url}/v1/models")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, RequestError),
        (401, RequestError),
        (404, RequestError),
        (413, RequestError),
        (500, ServerFault),
        (502, ServerFault),
        (429, ServerFault),
        (302, ServerFault),
    ],
)
def test_who_is_to_blame_is_told_by_the_status(
    status: int, kind: type[Exception], url: str, stand_in: StandIn
):
    stand_in.refusals = {"/health": status}
    with pytest.raises(kind, match=rf"{url}/health: HTTP {status}: .*refused"):
        answered(f"{url}/health")


def test_where_nothing_listens_the_remedy_is_said():
    with pytest.raises(ServerFault, match=r"nothing answers at http://127.0.0.1:9.*: start vLLM"):
        answered("http://127.0.0.1:9/health")
