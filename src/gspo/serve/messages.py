"""The texts in messages of OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gspo.core.errors import RequestError, shown


def text_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with their text parts joined.

    Raises:
        RequestError: a message without a role, or with parts that are not text.
    """
    return [_with_plain_text(message, i) for i, message in enumerate(messages)]


def texts_in(value: Any) -> list[str]:
    """Every text in a value of JSON, however deep it stands.

    >>> texts_in([{"role": "user", "content": "hi"}])
    ['role', 'user', 'content', 'hi']
    """
    found, left = [], [value]
    while left:  # no recursion: a client chooses how deep it is
        item = left.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, Mapping):
            left += [part for pair in reversed([*item.items()]) for part in reversed(pair)]
        elif isinstance(item, list):
            left += reversed(item)
    return found


def check_whole_characters(texts: Iterable[str]) -> None:
    """Refuse halves of surrogate pairs: JSON can spell them, but they are no characters.

    Raises:
        RequestError: a text has one in it.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"a text has half a surrogate pair in it: {error}") from None


def _with_plain_text(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    if not isinstance(message.get("role"), str):
        raise RequestError(f"messages[{index}] has no role", param="messages")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            fine = isinstance(part, dict) and part.get("type") == "text"
            if not fine or not isinstance(part.get("text"), str):
                raise RequestError(
                    f"messages[{index}]: only text parts are supported, "
                    f'{{"type": "text", "text": "..."}}, not {shown(part)}',
                    param="messages",
                )
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise RequestError(
            f"messages[{index}].content = {shown(content)}: must be text, or a list of text parts",
            param="messages",
        )
    return {**message, "content": content or ""}
