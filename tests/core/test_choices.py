"""What other clients call a choice becomes OpenAI's Choice, with gspo's fields."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from openai.types import CompletionChoice
from openai.types.chat import ChatCompletionMessage
from pydantic import BaseModel, ConfigDict

import gspo as art
from gspo.core.choices import as_choice
from gspo.core.errors import DataError, MissingLogprobsError
from gspo.data.sample import trajectory_samples
from support import choice

TOKENS: dict[str, Any] = {
    "token_ids": [4, 5],
    "prompt_token_ids": [1, 2, 3],
    "token_logprobs": [-0.5, -1.5],
    "temperature": 0.7,
    "policy_version": 3,
}


class Choices(BaseModel):
    """As litellm's: a class of its own, with a message of its own."""

    model_config = ConfigDict(extra="allow")

    finish_reason: str
    index: int
    message: Any
    provider_specific_fields: dict[str, Any] | None = None


def completion_choice(**fields: Any) -> CompletionChoice:
    given = {"index": 0, "finish_reason": "length", "logprobs": None, "text": "x", **fields}
    return CompletionChoice.model_validate(given)


MESSAGE = {"role": "assistant", "content": "x"}
ALIKE = {
    "OpenAI's": choice([4, 5]).model_copy(update=TOKENS),
    "completions route": completion_choice(**TOKENS),
    "litellm": Choices(finish_reason="stop", index=0, message=MESSAGE, **TOKENS),
    "litellm, tokens apart": Choices(
        finish_reason="stop", index=0, message=MESSAGE, provider_specific_fields=TOKENS
    ),
    "message object": SimpleNamespace(
        message=ChatCompletionMessage(role="assistant", content="x"), **TOKENS
    ),
    "dict": {"finish_reason": "stop", "message": MESSAGE, **TOKENS},
}


@pytest.mark.parametrize("item", ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize("appended", [False, True])
def test_every_form_is_trained_on_alike(item: Any, appended: bool):
    items: list[Any] = [{"role": "user", "content": "?"}]
    trajectory = art.Trajectory(messages_and_choices=items if appended else [*items, item])
    if appended:
        trajectory.messages_and_choices.append(item)
    assert trajectory.messages() == [{"role": "user", "content": "?"}, MESSAGE]
    (sample,) = trajectory_samples(trajectory)
    assert sample.tokens.tolist() == [1, 2, 3, 4, 5]
    assert sample.ratio_mask.tolist() == [False] * 3 + [True] * 2
    assert sample.old_logprobs[3:].tolist() == [-0.5, -1.5]
    assert sample.temperatures[4] == pytest.approx(0.7)
    assert sample.policy_versions[4] == 3


def test_log_probs_of_the_completions_route_are_found_in_openais_own_place():
    tokens = {k: v for k, v in TOKENS.items() if k != "token_logprobs"}
    item = completion_choice(logprobs={"token_logprobs": [-0.5, -1.5]}, **tokens)
    (sample,) = trajectory_samples(art.Trajectory(messages_and_choices=[item]))  # pyright: ignore[reportArgumentType]
    assert sample.old_logprobs[3:].tolist() == [-0.5, -1.5]


def test_a_choice_of_another_server_is_refused_where_it_is_trained():
    trajectory = art.Trajectory(messages_and_choices=[completion_choice()])  # pyright: ignore[reportArgumentType]
    with pytest.raises(MissingLogprobsError, match="no token_ids and no prompt_token_ids"):
        trajectory_samples(trajectory)


def test_messages_are_no_choices():
    for item in ({"role": "tool", "content": "3"}, {"content": "no role"}, "text", 3, None):
        assert as_choice(item) is None


def test_a_choice_with_fields_of_another_type_is_named():
    with pytest.raises(DataError, match=r"Choices is no choice .* finish_reason"):
        as_choice(Choices(finish_reason="odd", index=0, message=MESSAGE))
