"""OpenAI's request bodies, as far as they mean something here."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from gspo.core.draws import purpose
from gspo.core.errors import RequestError, shown, suggestion
from gspo.serve.engine import SamplingParams

_IGNORABLE = {"user", "metadata", "service_tier", "prompt_cache_key", "safety_identifier"}
"""Labels for the provider's own books: they ask for nothing that changes an answer."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "store": (False,),
    "stream_options": (None,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "add_special_tokens": (False,),
    "chat_template": ("",),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "prompt_logprobs": (0,),
}
"""Parameters of OpenAI's and vLLM's APIs that this version doesn't have, and the values that ask
for nothing.
Any other value is refused by name: nothing is accepted and ignored."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)  # JSON has numbers: "2" or true is none

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
        """The engine's parameters.

        Raises:
            RequestError: an unknown parameter, or a value out of range.
        """
        self._refuse_unknown()
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            n=self.n,
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop=stop,
            seed=self.seed,
            purpose=purpose(),
            expert_choices=self.return_routes,
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            min_tokens=self.min_tokens,
            skip_special_tokens=self.skip_special_tokens,
        )

    def _refuse_unknown(self) -> None:
        for name, value in (self.model_extra or {}).items():
            if value is None or name in _IGNORABLE or _is_neutral(name, value):
                continue
            if name in _NEUTRAL:
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
        """max_completion_tokens, under its new or its old name."""
        new = self.max_completion_tokens
        return self.max_tokens if new is None else new

    def text_messages(self) -> list[dict[str, Any]]:
        """The messages with their text parts joined.

        Raises:
            RequestError: a message without a role, or with parts that are not text.
        """
        return [_plain(message, i) for i, message in enumerate(self.messages)]


class CompletionBody(_Body):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = 16
    logprobs: int | None = None
    add_special_tokens: bool = True

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, as text or as token ids.

        Raises:
            RequestError: there is none.
        """
        if not self.prompt and not isinstance(self.prompt, str):
            raise RequestError("prompt = []: give at least one prompt", param="prompt")
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return list(self.prompt)  # pyright: ignore[reportReturnType]


def _is_neutral(name: str, value: Any) -> bool:
    """Whether this value of a parameter asks for nothing. Here 0 is not False."""
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        for neutral in _NEUTRAL.get(name, ())
    )


def _plain(message: dict[str, Any], index: int) -> dict[str, Any]:
    if not isinstance(message.get("role"), str):
        raise RequestError(f"messages[{index}] has no role", param="messages")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part_text(part, index) for part in content)
    if content is not None and not isinstance(content, str):
        raise RequestError(
            f"messages[{index}].content = {shown(content)}: must be text, or a list of text parts",
            param="messages",
        )
    return {**message, "content": content or ""}


def _part_text(part: Any, index: int) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise RequestError(
            f"messages[{index}]: only text parts are supported, "
            f'{{"type": "text", "text": "..."}}, not {shown(part)}',
            param="messages",
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise RequestError(
            f"messages[{index}]: the text of a part is {shown(text)}: must be a string",
            param="messages",
        )
    return text
