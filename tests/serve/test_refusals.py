"""Every error in OpenAI's shape and status, whatever was wrong; and the document says so."""

from __future__ import annotations

from typing import Any

import fastapi
import httpx
import pytest

from gspo.core.errors import BusyError, DataError, RequestError, ServeError
from gspo.serve.fake_engine import FakeEngine
from gspo.serve.refusals import Refusal, refusal
from support import app_of

JSON = {"content-type": "application/json"}


@pytest.fixture
async def http():
    transport = httpx.ASGITransport(app=app_of(FakeEngine()), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        yield client


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (RequestError("no", "n"), 400, "invalid_request_error"),
        (Refusal(404, "no", param="model"), 404, "invalid_request_error"),
        (BusyError("full"), 429, "rate_limit_error"),
        (Refusal(499, "gone"), 499, "invalid_request_error"),
        (ServeError("stuck"), 500, "server_error"),
        (DataError("bad"), 500, "server_error"),
        (KeyError("a bug"), 500, "server_error"),
    ],
)
def test_status_and_kind(error: Exception, status: int, kind: str):
    told, body = refusal(error)
    assert (told, body["error"]["type"]) == (status, kind)
    assert set(body["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "message"),
    [
        ("GET", "/nowhere", b"", 404, "no route /nowhere. A base URL ends in /v1"),
        ("POST", "/v1/embeddings", b"{}", 404, "embeddings, images and audio need another one"),
        ("GET", "/v1/chat/completions", b"", 405, "does not answer GET"),
        ("POST", "/v1/chat/completions", b'{"model": ', 400, "the body is no JSON"),
        ("POST", "/v1/chat/completions", b"", 400, "must be a JSON object"),
        ("POST", "/v1/chat/completions", b"[1]", 400, "must be a JSON object"),
        ("POST", "/v1/chat/completions", b"[" * 100_000, 400, ""),
        ("POST", "/v1/chat/completions", b'{"model": "\xff"}', 400, ""),
        ("POST", "/v1/chat/completions", b'{"model": "m"}', 400, "messages: Field required"),
        ("POST", "/v1/completions", b'{"model": "\\ud800", "prompt": "x"}', 404, "ud800"),
        ("POST", "/v1/completions", b'{"model": "m", "prompt": ["x", "\\ud800"]}', 400, ""),
        ("POST", "/v1/completions", b'{"model": "m", "prompt": "x", "\\ud800": 1}', 400, ""),
        (
            "POST",
            "/v1/completions",
            b'{"model": "m", "prompt": "x", "n": 1%s}' % (b"0" * 5000),
            400,
            "",
        ),
        (
            "POST",
            "/v1/completions",
            b'{"model": "m", "prompt": "x", "temperature": NaN}',
            400,
            "nan",
        ),
        ("GET", "/v1/models/x", b"", 404, "no model 'x' here"),
    ],
)
async def test_errors_over_http(http: httpx.AsyncClient, method, path, content, status, message):
    answer = await http.request(method, path, content=content, headers=JSON)
    assert answer.status_code == status
    detail = answer.json()["error"]
    assert message in detail["message"]
    if status == 405:
        assert answer.headers["allow"] == "POST"
    if path.startswith("/v1/models"):
        assert detail["code"] == "model_not_found"


async def test_half_a_surrogate_pair_in_a_message_is_no_text(http: httpx.AsyncClient):
    body = b'{"model": "m", "messages": [{"role": "user", "content": "a\\ud800"}]}'
    answer = await http.post("/v1/chat/completions", content=body, headers=JSON)
    assert answer.status_code == 400
    assert "half a surrogate pair" in answer.json()["error"]["message"]


async def test_a_form_of_a_page_is_refused(http: httpx.AsyncClient):
    """Which a browser sends to any address without asking."""
    answer = await http.post(
        "/v1/completions",
        content=b'{"model": "m", "prompt": "x"}',
        headers={"content-type": "text/plain"},
    )
    assert answer.status_code == 400


class Broken(FakeEngine):
    async def complete(self, request: Any) -> Any:
        raise ZeroDivisionError


async def test_a_bug_is_told_in_the_same_shape():
    transport = httpx.ASGITransport(app=app_of(Broken()), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        answer = await client.post("/v1/completions", json={"model": "m", "prompt": "x"})
    assert answer.status_code == 500
    assert "ZeroDivisionError" in answer.json()["error"]["message"]


def test_the_document_names_no_422():
    app: fastapi.FastAPI = app_of(FakeEngine())
    document = app.openapi()
    for operations in document["paths"].values():
        for operation in operations.values():
            assert {"200", "4XX", "5XX"} <= operation["responses"].keys()
            assert "422" not in operation["responses"]
    body = document["components"]["schemas"]["ChatBody"]
    assert body["additionalProperties"] is False
    assert body["properties"]["n"]["maximum"] == 4096
    assert body["properties"]["echo"]["enum"] == [None, False]
