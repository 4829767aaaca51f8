"""One form for what clients call a choice: OpenAI's `Choice`, with gspo's fields.

The completions route answers with `CompletionChoice`, litellm with `Choices`, other programs with
dicts. All of them carry the token ids and log-probs that training needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openai.types.chat.chat_completion import Choice
from pydantic import BaseModel, ValidationError

from gspo.core.errors import DataError


def as_choice(item: Any) -> Choice | None:
    """The `Choice` that `item` is or stands for; None if it is no choice.

    A choice has a `message` or a `text`, as attribute or key, and no `role` (a message has one).

    Raises:
        DataError: it looks like a choice, but its fields have other types.

    >>> as_choice({"text": "4", "finish_reason": "stop", "token_ids": [7]}).message.content
    '4'
    >>> as_choice({"role": "user", "content": "2 + 2?"}) is None
    True
    """
    if isinstance(item, Choice):
        return item
    fields = _fields(item)
    if fields is None or "role" in fields or not ({"message", "text"} & set(fields)):
        return None
    # litellm keeps here what OpenAI's class lacks.
    fields = {**(fields.pop("provider_specific_fields", None) or {}), **fields}
    if "text" in fields:  # of the completions route, whose log-probs stand elsewhere
        fields["message"] = {"content": fields.pop("text")}
        logprobs = _fields(fields.pop("logprobs", None)) or {}
        if fields.get("token_logprobs") is None and logprobs.get("token_logprobs") is not None:
            fields["token_logprobs"] = logprobs["token_logprobs"]
    message = _fields(fields["message"])
    if message is not None:
        fields["message"] = {"role": "assistant", **message}
    fields["index"] = fields.get("index") or 0
    fields["finish_reason"] = fields.get("finish_reason") or "stop"
    try:
        return Choice.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(
            f"a {type(item).__name__} is no choice that can be trained on: "
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from None


def _fields(item: Any) -> dict[str, Any] | None:
    """The fields of a mapping, a pydantic model or a plain object; None of anything else."""
    if isinstance(item, Mapping):
        return dict(item)
    if isinstance(item, BaseModel):
        return item.model_dump(warnings=False)
    return dict(vars(item)) if hasattr(item, "__dict__") else None
