"""A hub that answers, one that does not, and one that nobody may ask."""

from __future__ import annotations

import httpx
import pytest

from gspo.core import hub


def test_only_an_answer_counts_whatever_it_says(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def busy(url: str, timeout: float) -> httpx.Response:
        asked.append(url)
        return httpx.Response(503)

    def unreachable(url: str, timeout: float) -> httpx.Response:
        raise httpx.ProxyError("403 Forbidden")

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.httpx, "head", busy)
    assert hub.hub_answers() and asked == [hub.ENDPOINT]
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    assert not hub.hub_answers() and len(asked) == 1
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.httpx, "head", unreachable)
    assert not hub.hub_answers()
