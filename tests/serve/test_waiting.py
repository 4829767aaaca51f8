"""Long texts hold up nobody. Clients that leave: `test_app.py`."""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import httpx
import pytest
from openai import BadRequestError

from gspo.serve.engine import Request
from gspo.serve.fake_engine import FakeEngine, FakeTokenizer
from gspo.serve.local_client import in_process_client
from support import app_of


class Counting(FakeTokenizer):
    """Notes in which thread it tokenizes."""

    def __init__(self) -> None:
        self.threads: list[str] = []

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        self.threads.append(threading.current_thread().name)
        return super().encode(text, special=special)


def counting() -> tuple[FakeEngine, Counting]:
    engine, tokenizer = FakeEngine(), Counting()
    engine.tokenizer = tokenizer
    return engine, tokenizer


async def test_what_cannot_fit_is_refused_before_it_is_tokenized():
    engine, tokenizer = counting()
    async with in_process_client(app_of(engine)) as client:
        long: Any = [{"role": "user", "content": "x" * 10**7}]
        for _ in range(2):
            with pytest.raises(BadRequestError, match="text of 10000000 characters cannot fit"):
                await client.chat.completions.create(model="m", messages=long)
    assert tokenizer.threads == []


async def test_grammars_are_compiled_beside_the_event_loop():
    class Checking(FakeEngine):
        threads: ClassVar[list[str]] = []

        def check(self, request: Request) -> None:
            self.threads.append(threading.current_thread().name)
            super().check(request)

    transport = httpx.ASGITransport(app=app_of(Checking(lambda prompt, index: "{}")))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        body = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
        asked = body | {"response_format": {"type": "json_object"}}
        assert (await client.post("/v1/chat/completions", json=asked)).status_code == 200
        first = Checking.threads[0]
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert first != "MainThread"


async def test_long_texts_are_tokenized_beside_the_event_loop():
    engine, tokenizer = counting()
    engine.context = tokenizer.most_characters = 10**6
    transport = httpx.ASGITransport(app=app_of(engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        for size in (10, 20_000):
            body = {"model": "m", "prompt": "x" * size}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert tokenizer.threads[0] == "MainThread" != tokenizer.threads[2]
