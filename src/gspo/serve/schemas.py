"""OpenAI's request bodies, as far as they mean something here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gspo.core.draws import purpose
from gspo.core.errors import RequestError, shown, suggestion
from gspo.core.plain import deeper_than
from gspo.serve.call_formats import DEEPEST
from gspo.serve.chat import ChatFormat
from gspo.serve.engine import SamplingParams
from gspo.serve.messages import text_messages
from gspo.serve.params import MOST_COMPLETIONS

_IGNORABLE = {"user", "metadata", "service_tier", "prompt_cache_key", "prompt_cache_retention"}
_IGNORABLE |= {"safety_identifier", "verbosity"}
"""Labels for the provider's own books, and hints: they ask for nothing that changes an answer."""
_STORED = "nothing is stored: send the whole conversation"
_SCORED = "log-probs are of sampled tokens only"
_DRAWN = "completions are drawn one by one: ask for several by n"
_UNSUPPORTED: tuple[tuple[Any, str, str], ...] = (
    (False, "store background", _STORED),
    (None, "previous_response_id conversation prompt", _STORED),
    (False, "echo", _SCORED),
    (0, "prompt_logprobs", _SCORED),
    (False, "use_beam_search", _DRAWN),
    (1, "best_of length_penalty", _DRAWN),
    (False, "add_special_tokens", "the chat template writes them"),
    ("", "chat_template", "the template is the model's own; its variables: chat_template_kwargs"),
    ("", "suffix", "a completion goes on from its prompt"),
    ([], "functions documents", "give tools, and write documents into the messages"),
    (None, "function_call", "use tool_choice"),
    (["text"], "modalities", "this server writes text"),
    (None, "audio", "this server writes text"),
    (None, "web_search_options max_tool_calls", "it is the client that runs tools"),
    ("disabled", "truncation", "send what fits the model's context"),
    (None, "context_management prediction", "the prompt is what is sent, and no more"),
)
"""Parameters of OpenAI's and vLLM's APIs that this version doesn't have, behind the value that asks
for nothing, and what to do instead. Nothing is accepted and ignored."""
_SAMPLING = {"n", "temperature", "top_p", "seed", "ignore_eos", "min_tokens", "skip_special_tokens"}
_SAMPLING |= {"min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
"""Fields that are named as in `SamplingParams`; null means its default."""


def _document(schema: dict[str, Any]) -> None:
    """Write down which other fields a body may have."""
    fields = schema["properties"]
    schema["additionalProperties"] = False
    for name in sorted(_IGNORABLE - fields.keys()):
        fields[name] = {"description": "accepted; asks for nothing that changes an answer"}
    for value, names, _ in _UNSUPPORTED:
        for name in names.split():
            fields.setdefault(name, {"enum": [None], "description": "not supported"})
            if "enum" in fields[name] and value is not None:
                fields[name]["enum"].append(value)


# A list or a dict of millions is refused at its first fault: each further one would be noted too.
Texts = Annotated[list[str], Field(fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]
Dicts = Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=65_536)]
Prompts = Annotated[list[Ids], Field(fail_fast=True, max_length=MOST_COMPLETIONS)]
Numbers = Field(json_schema_extra={"additionalProperties": {"type": "number"}})


def ranged(low: float, high: float | None = None) -> Any:
    """A number that may be left out. The engine checks its range, which the document shows."""
    limits: dict[str, Any] = {"minimum": low} | ({} if high is None else {"maximum": high})
    return Field(default=None, json_schema_extra=limits)


class _Asked(BaseModel):
    """A request's body. Fields that it doesn't have are refused by name."""

    # "2" and true are no numbers
    model_config = ConfigDict(extra="allow", strict=True, json_schema_extra=_document)

    model: str

    @model_validator(mode="before")
    @classmethod
    def _is_not_too_deep(cls, body: Any) -> Any:
        if deeper_than(DEEPEST, body):
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        return body

    def refuse_unknown(self) -> None:
        """Refuse fields that mean nothing here, unless their value asks for nothing.

        Raises:
            RequestError: it names the first.
        """
        for name, value in (self.model_extra or {}).items():
            known = [(value, why) for value, names, why in _UNSUPPORTED if name in names.split()]
            if value is None or name in _IGNORABLE or any(_same(value, x) for x, _ in known):
                continue
            if known:
                raise RequestError(f"{name} is not supported: {known[0][1]}", param=name)
            # A far-fetched hint misleads: only a misspelling gets one.
            near = suggestion(name, type(self).model_fields, cutoff=0.8)
            raise RequestError(f"unknown parameter {name!r}.{near}", param=name)


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`: what a stream carries besides the answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SampledBody(_Asked):
    """What the routes that sample have in common."""

    n: int | None = ranged(1, MOST_COMPLETIONS)
    temperature: float | None = ranged(0, 100)
    top_p: float | None = ranged(0, 1)
    stop: str | Texts | None = None
    seed: int | None = None
    return_routes: bool | None = None
    return_token_ids: bool | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Ids | None = None
    min_tokens: int | None = ranged(0)
    skip_special_tokens: bool | None = None
    top_k: int | None = ranged(-1)
    min_p: float | None = ranged(0, 1)
    repetition_penalty: float | None = ranged(0.01, 100)
    presence_penalty: float | None = ranged(-2, 2)
    frequency_penalty: float | None = ranged(-2, 2)
    logit_bias: Annotated[dict[str, Any], Numbers] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling(self, max_tokens: int | None, top_logprobs: int = 0) -> SamplingParams:
        """Return the engine's parameters.

        Raises:
            RequestError: an unknown parameter, or a value out of range.
        """
        self.refuse_unknown()
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is for streams: stream = true", "stream_options")
        return SamplingParams(
            **self.model_dump(include=_SAMPLING, exclude_none=True),
            max_tokens=max_tokens,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            purpose=purpose(),
            expert_choices=bool(self.return_routes),
            top_k=0 if self.top_k in (-1, None) else self.top_k,
            logit_bias=tuple(self._biases()),
            top_logprobs=top_logprobs,
        )

    def usage_asked(self) -> bool:
        """Whether a stream ends with its counts of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _biases(self) -> Iterator[tuple[int, float]]:
        for name, bias in sorted((self.logit_bias or {}).items()):
            token = name.isascii() and name.isdecimal() and name == str(int(name[:10]))
            if not token or type(bias) not in (int, float):
                told = f"logit_bias: {shown(name)} is no token id, or {shown(bias)} no number"
                raise RequestError(told, "logit_bias")
            yield int(name), bias


class AnsweredBody(SampledBody):
    """What a chat and a response have in common."""

    top_logprobs: int | None = ranged(0, 20)
    tools: Dicts | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatBody(AnsweredBody):
    """POST /v1/chat/completions."""

    messages: Dicts = Field(min_length=1)
    max_tokens: int | None = ranged(1)
    max_completion_tokens: int | None = ranged(1)
    logprobs: bool | None = None
    response_format: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    reasoning_effort: str | None = None

    def params(self) -> SamplingParams:
        """See `sampling`."""
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs is for logprobs = true", "top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise RequestError(
                f"max_tokens = {self.max_tokens}, max_completion_tokens = "
                f"{self.max_completion_tokens}: they are one limit, under its old and its new name",
                "max_completion_tokens",
            )
        return self.sampling(next(iter(limits), None), self.top_logprobs or 0)

    def calls(self) -> list[dict[str, Any]] | None:
        """Those of the tools that may be called; None: what looks like a call is text."""
        return self.tools or None if self.tool_choice != "none" else None

    def template_kwargs(self, chat: ChatFormat) -> dict[str, Any]:
        """Variables of the chat template.

        Raises:
            RequestError: reasoning_effort, for a template that knows none.
        """
        given = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            if not chat.mentions("reasoning_effort"):
                raise RequestError(
                    f"reasoning_effort: the chat template of {chat.source} knows none; see its own "
                    "variables, for chat_template_kwargs",
                    "reasoning_effort",
                )
            given.setdefault("reasoning_effort", self.reasoning_effort)
        return given


class CompletionBody(SampledBody):
    """POST /v1/completions."""

    prompt: str | Texts | Ids | Prompts
    max_tokens: int | None = ranged(1)
    logprobs: int | None = ranged(0, 20)
    add_special_tokens: bool | None = None

    def params(self) -> SamplingParams:
        """See `sampling`. `logprobs` is how many tokens have theirs, beside the chosen one."""
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise RequestError(f"logprobs = {self.logprobs}: must be in 0..20", "logprobs")
        limit = 16 if self.max_tokens is None else self.max_tokens
        return self.sampling(limit, self.logprobs or 0)

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one, as text or as token ids.

        Raises:
            RequestError: there is none.
        """
        if not self.prompt and not isinstance(self.prompt, str):
            raise RequestError("prompt = []: give at least one prompt", param="prompt")
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if single else list(self.prompt)  # pyright: ignore[reportReturnType]


class TokenizeBody(_Asked):
    """POST /tokenize: a text, or the messages of a chat."""

    prompt: str | None = None
    messages: Dicts | None = None
    add_special_tokens: bool | None = None
    tools: Dicts | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def content(self) -> tuple[str, list[dict[str, Any]] | None]:
        """Return the text, and the messages if it is them that are given.

        Raises:
            RequestError: neither is given, or both are.
        """
        self.refuse_unknown()
        if (self.prompt is None) == (not self.messages):
            raise RequestError("give either prompt, a text, or messages", "prompt")
        others = ("add_special_tokens",) if self.messages else ("tools", "chat_template_kwargs")
        for name in others:
            if getattr(self, name):
                kind = "a prompt" if self.messages else "messages"
                raise RequestError(f"{name} is of {kind}: leave it out", name)
        return self.prompt or "", text_messages(self.messages) if self.messages else None


class DetokenizeBody(_Asked):
    """POST /detokenize."""

    tokens: Ids


def _same(value: Any, neutral: Any) -> bool:
    """Whether two values of JSON are equal. Here 0 is not False."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
