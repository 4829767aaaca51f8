"""Texts of messages."""

from __future__ import annotations

from typing import Any

import pytest

from gspo.core.errors import RequestError
from gspo.serve.message_texts import check_whole_characters, text_messages, texts_in


def test_messages_with_their_text_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages: list[Any] = [{"role": "user", "content": parts}, {"role": "assistant", "x": 1}]
    assert text_messages(messages) == [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "x": 1, "content": ""},
    ]
    with pytest.raises(RequestError, match=r"messages\[0\] has no role"):
        text_messages([{"content": "a"}])


def test_half_a_character_is_refused():
    check_whole_characters(["\U0001f600", "a"])
    with pytest.raises(RequestError, match="half a surrogate pair"):
        check_whole_characters(["a", "\ud83d"])


def test_every_text_however_deep():
    deep: Any = "x"
    for _ in range(50_000):
        deep = [deep]
    assert texts_in({"a": [deep, {"b": "c"}]}) == ["a", "x", "b", "c"]
