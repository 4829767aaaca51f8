"""What a server counts, for Prometheus: each app has its own registry."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gspo.serve.engine import Engine
from gspo.serve.refusals import HUNG_UP

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Meters:
    """Counts of one app.

    >>> meters = Meters()
    >>> meters.tokens.labels("prompt").inc(3)
    >>> b'gspo_tokens_total{kind="prompt"} 3.0' in meters.text({})
    True
    """

    def __init__(self) -> None:
        self.registry = kept = CollectorRegistry()
        self.requests = Counter(
            "gspo_requests", "Requests answered", ["route", "status"], registry=kept
        )
        self.tokens = Counter(
            "gspo_tokens", "Tokens of prompts, and sampled ones", ["kind"], registry=kept
        )
        self.seconds = Histogram(
            "gspo_request_seconds", "From a request to the end of its answer", ["route"],
            buckets=_SECONDS, registry=kept,
        )  # fmt: skip
        self.first_token = Histogram(
            "gspo_first_token_seconds", "From a streamed request to its first token",
            buckets=_SECONDS, registry=kept,
        )  # fmt: skip
        self._engines = {
            name: Gauge(f"gspo_{name}", text, ["model"], registry=kept)
            for name, text in (
                ("requests_running", "Requests that the engine samples now"),
                ("requests_waiting", "Requests that wait for a place in the engine"),
                ("policy_version", "Version of the weights that the engine samples with"),
            )
        }

    def text(self, engines: Mapping[str, Engine]) -> bytes:
        """Write everything down in Prometheus's format, for `engines` by the model's name."""
        for gauge in self._engines.values():
            gauge.clear()  # a model may be gone
        for name, engine in engines.items():
            values: Iterable[int] = (*engine.traffic, engine.policy_version)
            for gauge, value in zip(self._engines.values(), values, strict=True):
                gauge.labels(name).set(value)
        return generate_latest(self.registry)


class Metered:
    """Counts each request by its route and status once its answer is out."""

    def __init__(self, app: ASGIApp, meters: Meters):
        self._app, self._meters = app, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status, whole = time.monotonic(), str(HUNG_UP), False

        async def watched(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await self._app(scope, receive, watched)
        finally:
            route = _route(scope)
            self._meters.requests.labels(route, status if whole else str(HUNG_UP)).inc()
            self._meters.seconds.labels(route).observe(time.monotonic() - began)


def _route(scope: Scope) -> str:
    """The route that answered: not the path as sent, since anybody could make up a million."""
    route, path = getattr(scope.get("route"), "path", "unknown"), scope["path"]
    if route == "unknown" or path.startswith(route.partition("{")[0]):
        return route
    # An included router's routes are told without its prefix.
    return "/v1" + route if path.startswith("/v1/") else "/episodes/{episode}/v1" + route
