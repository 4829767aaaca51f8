"""What /metrics tells."""

from __future__ import annotations

import httpx
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from gspo.serve.fake_engine import FakeEngine
from gspo.serve.local_client import in_process_client
from support import app_of


async def values(client: AsyncOpenAI) -> dict[tuple, float]:
    """Name and labels of each sample -> its value."""
    text = (await client.get("http://gspo.local/metrics", cast_to=httpx.Response)).text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {(s.name, *sorted(s.labels.items())): s.value for s in samples}


async def test_each_app_counts_for_itself():
    engine = FakeEngine(lambda prompt, index: "hi")
    engine.policy_version, engine.traffic = 3, (2, 5)
    async with in_process_client(app_of(engine)) as client:
        await client.completions.create(model="m", prompt="abc")
        stream = await client.completions.create(model="m", prompt="abc", stream=True)
        assert len([chunk async for chunk in stream]) == 3
        await client.with_options(max_retries=0).models.list()
        told = await values(client)
    assert told["gspo_tokens_total", ("kind", "prompt")] == 6
    assert told["gspo_tokens_total", ("kind", "sampled")] == 6
    route = ("route", "/v1/completions")
    assert told["gspo_requests_total", route, ("status", "200")] == 2
    assert told["gspo_request_seconds_count", route] == 2
    assert told["gspo_first_token_seconds_count",] == 1
    assert told["gspo_policy_version", ("model", "m")] == 3
    assert told["gspo_requests_running", ("model", "m")] == 2
    assert told["gspo_requests_waiting", ("model", "m")] == 5
    async with in_process_client(app_of(FakeEngine())) as client:
        assert ("gspo_tokens_total", ("kind", "prompt")) not in await values(client)


async def test_unknown_paths_are_one_route():
    app = app_of(FakeEngine())
    async with in_process_client(app) as client:
        for path in ("a", "b"):
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
                await http.get(f"/{path}")
        told = await values(client)
    assert told["gspo_requests_total", ("route", "unknown"), ("status", "404")] == 2
