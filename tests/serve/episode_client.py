"""A client of the routes of episodes, over a server in this process."""

from __future__ import annotations

from typing import Any

from openai import AsyncOpenAI

HI: Any = [{"role": "user", "content": "hi"}]


def names() -> list[str]:
    return ["m"]


def of(client: AsyncOpenAI, id: str) -> AsyncOpenAI:
    return client.with_options(base_url=f"http://gspo.local/episodes/{id}/v1")


async def send(client: AsyncOpenAI, method: str, path: str, **body: Any) -> Any:
    content: Any = {"json": body} if body else {}
    return await client._client.request(method, f"http://gspo.local/episodes/{path}", **content)
