"""OpenAI's request bodies, as far as they mean something here."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from gspo.core.draws import purpose
from gspo.core.errors import RequestError, shown, suggestion
from gspo.serve.engine import SamplingParams

_IGNORABLE = {"user", "metadata", "service_tier", "prompt_cache_key", "safety_identifier"}
"""Labels for the provider's own books: they ask for nothing that changes an answer."""
_UNSUPPORTED: tuple[tuple[Any, str], ...] = (
    (False, "stream store echo use_beam_search add_special_tokens continue_final_message"),
    (0, "frequency_penalty presence_penalty top_logprobs top_k min_p prompt_logprobs"),
    (1, "best_of repetition_penalty length_penalty"),
    ("", "suffix chat_template"),
    ({}, "logit_bias chat_template_kwargs"),
    ([], "tools"),
    (-1, "top_k"),
    ("none", "tool_choice"),
    ("auto", "tool_choice"),
    ({"type": "text"}, "response_format"),
    (None, "stream_options"),
)
"""Parameters of OpenAI's and vLLM's APIs that this version doesn't have, behind the value that asks
for nothing. Any other value is refused by name: nothing is accepted and ignored."""
_SAMPLING = {"n", "temperature", "top_p", "seed", "ignore_eos", "min_tokens", "skip_special_tokens"}
"""Fields that are named as in `SamplingParams`; null means its default."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)  # "2" and true are no numbers

    model: str
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    return_routes: bool = False
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    min_tokens: int = 0
    skip_special_tokens: bool = True

    def sampling(self, max_tokens: int | None) -> SamplingParams:
        """Return the engine's parameters.

        Raises:
            RequestError: an unknown parameter, or a value out of range.
        """
        self._refuse_unknown()
        return SamplingParams(
            **self.model_dump(include=_SAMPLING, exclude_none=True),
            max_tokens=max_tokens,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            purpose=purpose(),
            expert_choices=self.return_routes,
        )

    def _refuse_unknown(self) -> None:
        for name, value in (self.model_extra or {}).items():
            neutral = [value for value, names in _UNSUPPORTED if name in names.split()]
            if value is None or name in _IGNORABLE or any(_same(value, x) for x in neutral):
                continue
            if neutral:
                raise RequestError(f"{name} is not supported by this server yet", param=name)
            # A far-fetched hint misleads: only a misspelling gets one.
            near = suggestion(name, type(self).model_fields, cutoff=0.8)
            raise RequestError(f"unknown parameter {name!r}.{near}", param=name)


class ChatBody(_Body):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None

    def limit(self) -> int | None:
        """Return max_completion_tokens, or what is given under its old name."""
        new = self.max_completion_tokens
        return self.max_tokens if new is None else new

    def text_messages(self) -> list[dict[str, Any]]:
        """Return the messages with their text parts joined.

        Raises:
            RequestError: a message without a role, or with parts that are not text.
        """
        return [_with_plain_text(message, i) for i, message in enumerate(self.messages)]


class CompletionBody(_Body):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = 16
    logprobs: int | None = None
    add_special_tokens: bool = True

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one, as text or as token ids.

        Raises:
            RequestError: there is none.
        """
        if not self.prompt and not isinstance(self.prompt, str):
            raise RequestError("prompt = []: give at least one prompt", param="prompt")
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if single else list(self.prompt)  # pyright: ignore[reportReturnType]


def _same(value: Any, neutral: Any) -> bool:
    """Whether two values of JSON are equal. Here 0 is not False."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _with_plain_text(message: dict[str, Any], index: int) -> dict[str, Any]:
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
