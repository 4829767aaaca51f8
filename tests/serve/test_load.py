"""Many clients at once over real sockets: right answers or clean refusals, and nothing is left."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from openai import APITimeoutError, AsyncOpenAI, DefaultAsyncHttpxClient, RateLimitError

from gspo.core.compute import ComputeThread
from gspo.serve.connection import PortServer
from gspo.serve.local_client import http, in_process_client
from gspo.serve.selfcheck import make_engine
from gspo.serve.server import address, bind
from support import app_of, embedded

SECONDS = 420

Answer = dict[int, tuple[str, list[int], list[float]]]


@dataclass
class Chat:
    """What one client asks, and when it leaves."""

    number: int
    call: dict[str, Any]
    streams: bool
    leaves_after: float | None


def chats(count: int, leaving: int, rng: random.Random) -> list[Chat]:
    """Chats of mixed length, every second one streamed; `leaving` of them hang up."""
    leavers = set(rng.sample(range(count), leaving))
    made = []
    for number in range(count):
        digits = "".join(rng.choices("0123456789", k=rng.randint(1, 40)))
        call = {
            "messages": [{"role": "user", "content": digits}],
            "n": rng.choice([1, 1, 2, 5]),
            "max_tokens": rng.choice([1, 8, 16, 60]),
            "seed": number,
        }
        if rng.random() < 0.3:
            call["extra_body"] = {"ignore_eos": True}
        after = rng.uniform(0.0, 3.0) if number in leavers else None
        made.append(Chat(number, call, rng.random() < 0.5, after))
    return made


async def answer_of(client: AsyncOpenAI, chat: Chat) -> Answer:
    """Text, tokens and log-probs of each choice."""
    call: dict[str, Any] = {"model": "m", **chat.call}
    if not chat.streams:
        answer: Any = await client.chat.completions.create(**call)
        return {c.index: (c.message.content, c.token_ids, c.token_logprobs) for c in answer.choices}
    got: Answer = {}
    async with await client.chat.completions.create(stream=True, **call) as stream:
        async for chunk in stream:
            for choice in chunk.choices:
                extra: Any = choice.model_extra or {}
                text, tokens, logprobs = got.get(choice.index, ("", [], []))
                got[choice.index] = (
                    text + (choice.delta.content or ""),
                    tokens + extra.get("token_ids", []),
                    logprobs + extra.get("token_logprobs", []),
                )
    return got


async def outcome_of(client: AsyncOpenAI, chat: Chat) -> Any:
    try:
        async with asyncio.timeout(chat.leaves_after):
            return await answer_of(client, chat)
    except TimeoutError:
        return "left"
    except RateLimitError as error:
        assert int(error.response.headers["retry-after"]) >= 1
        return "refused"
    except APITimeoutError:
        return "late"


def resident() -> int:
    """Bytes of memory that this process has."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def settled(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.02)


async def load(count: int, leaving: int, checked: int, *, memory: bool) -> Counter[str]:
    compute = ComputeThread()
    policy = await compute.run(embedded)
    engine: Any = await compute.run(lambda: make_engine(policy, compute, sockets=True, exact=True))
    app, listener = app_of(engine), bind("127.0.0.1", 0)
    server = PortServer(app, "127.0.0.1", None, 5)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    url = address(listener)
    thread.start()
    rng = random.Random(5)

    async def at_once(asked: list[Chat]) -> list[Any]:
        transport = DefaultAsyncHttpxClient(limits=http.Limits(max_connections=None))
        async with AsyncOpenAI(
            base_url=url, api_key="x", max_retries=0, timeout=SECONDS, http_client=transport
        ) as client:
            return await asyncio.gather(*(outcome_of(client, chat) for chat in asked))

    async def left_nothing() -> None:
        state, scheduler = server.server_state, engine._scheduler
        await settled(lambda: not (state.connections or state.tasks))
        await settled(lambda: not (scheduler._open or scheduler._active or scheduler._inbox))
        await settled(lambda: not any(d._sent or d._waiting for d in scheduler._desks.values()))
        assert (server._guard.running, server._guard._held) == (set(), 0)
        assert engine.traffic == (0, 0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    try:
        await at_once(chats(count // 10, 0, rng))
        await left_nothing()
        before = resident()
        asked = chats(count, leaving, rng)
        outcomes = await at_once(asked)
        await left_nothing()
        if memory:
            await asyncio.sleep(3)  # see `QUIET_TICKS`
        after = resident()
        async with in_process_client(app) as alone:
            whole = [c for c in asked if isinstance(outcomes[c.number], dict)]
            for chat in rng.sample(whole, min(checked, len(whole))):
                chat.streams = False
                assert await answer_of(alone, chat) == outcomes[chat.number], chat
        if memory:
            assert after < 1.1 * before + 50e6, (before, after)
        print(f"resident memory {before / 1e6:.0f} -> {after / 1e6:.0f} MB")
    finally:
        server.should_exit = True
        await asyncio.to_thread(thread.join, 20)
        engine.close()
        compute.close()
    assert not thread.is_alive()
    return Counter(o if isinstance(o, str) else "answered" for o in outcomes)


async def test_sixty_chats_at_once():
    counts = await load(60, 12, 12, memory=False)
    assert counts["answered"] + counts["left"] == 60 and counts["answered"] >= 48


@pytest.mark.slow
async def test_a_thousand_chats_at_once_of_which_two_hundred_hang_up():
    begun = time.monotonic()
    counts = await load(1000, 200, 250, memory=True)
    print(counts, f"{time.monotonic() - begun:.0f} s")
    assert counts["late"] == 0 and counts.total() == 1000
    assert counts["answered"] >= 700 and counts["left"] >= 50
