"""Read what training needs from a `Choice`: token ids, their log-probs, temperature, version."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np

from gspo.core.errors import DataError, MissingLogprobsError, shown
from gspo.core.options import TEMPERATURES
from gspo.data.expert_choices import decode_routes

_LARGEST_ID = 2**31 - 1  # token ids are stored as int32
_LARGEST_VERSION = 2**63 - 1
_LOGPROBS = (-1e30, 1e-5)
"""A log-prob of 0 may come out of float32 a little above it."""


@dataclass(frozen=True)
class ChoiceFields:
    """The fields of a Choice that training reads, checked. None where the Choice has none.

    Attributes:
        prompt: token ids that the engine was given.
        tokens: token ids that it sampled.
        logprobs: of the sampled tokens, at `temperature`.
        temperature: 1 if the Choice does not say.
        policy_version: of the weights that sampled; -1 if the Choice does not say.
        routes: experts that computed the tokens; None if the Choice has none, or no tokens.
    """

    prompt: list[int] | None
    tokens: list[int] | None
    logprobs: list[float] | None
    temperature: float
    policy_version: int
    routes: np.ndarray | None


@dataclass(frozen=True)
class Turn:
    """One Choice: what the engine saw, and what it sampled."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    temperature: float
    policy_version: int
    routes: np.ndarray | None = None


def read_turn(choice: Any, where: str) -> Turn:
    """Read a Choice that is to be trained on. `where` names it in errors.

    Raises:
        MissingLogprobsError: it has no token ids or no log-probs, or not one for each token.
        DataError: see `read_fields`.
    """
    fields = read_fields(choice, where)
    prompt, tokens, logprobs = fields.prompt, fields.tokens, fields.logprobs
    if not tokens or not prompt or not logprobs:
        named = {"token_ids": tokens, "prompt_token_ids": prompt, "log-probs": logprobs}
        missing = [name for name, values in named.items() if not values]
        raise MissingLogprobsError(
            f"{where} has no {' and no '.join(missing)}: roll out through model.openai_client() "
            "of a registered TrainableModel, whose choices always carry them"
        )
    if len(tokens) != len(logprobs):
        raise MissingLogprobsError(f"{where}: {len(tokens)} token ids, {len(logprobs)} log-probs")
    return Turn(prompt, tokens, logprobs, fields.temperature, fields.policy_version, fields.routes)


def read_fields(choice: Any, where: str) -> ChoiceFields:
    """Check the fields of a Choice that training reads. Each of them may be missing.

    Raises:
        MissingLogprobsError: log-probs that are no numbers, not finite, above 0 or of 16 bits.
        DataError: token ids that are no whole numbers, or a temperature or policy version that
            means nothing, or routes that are damaged.
    """
    prompt = _token_ids(getattr(choice, "prompt_token_ids", None), f"{where}: prompt_token_ids")
    tokens = _token_ids(getattr(choice, "token_ids", None), f"{where}: token_ids")
    routes = getattr(choice, "routed_experts", None)
    return ChoiceFields(
        prompt=prompt,
        tokens=tokens,
        logprobs=_logprobs(sampled_logprobs(choice), where),
        temperature=_temperature(getattr(choice, "temperature", None), where),
        policy_version=_version(getattr(choice, "policy_version", None), where),
        routes=decode_routes(routes, len(prompt) + len(tokens) - 1, where)
        if prompt and tokens
        else None,
    )


def sampled_logprobs(choice: Any) -> Any:
    """Log-probs of a Choice's tokens: gspo's field, else OpenAI's own; None if it has none."""
    logprobs = getattr(choice, "token_logprobs", None)
    content = getattr(getattr(choice, "logprobs", None), "content", None)
    if logprobs is None and isinstance(content, list):
        logprobs = [getattr(entry, "logprob", None) for entry in content]
    return logprobs


def _token_ids(values: Any, where: str) -> list[int] | None:
    if values is None:
        return None
    values = _as_list(values, where, "whole numbers")
    if not set(map(type, values)) <= {int}:  # numpy's integers count too; True is no token
        for i, value in enumerate(values):
            if not isinstance(value, numbers.Integral) or isinstance(value, bool):
                raise DataError(f"{where}[{i}] is {shown(value)}; token ids are whole numbers")
        values = [int(value) for value in values]
    if values and not (min(values) >= 0 and max(values) <= _LARGEST_ID):
        i = next(i for i, value in enumerate(values) if not 0 <= value <= _LARGEST_ID)
        raise DataError(
            f"{where}[{i}] is {shown(values[i])}; token ids are whole numbers from 0 up to the "
            "model's vocabulary"
        )
    return values


def _logprobs(values: Any, where: str) -> list[float] | None:
    if values is None:
        return None
    _refuse_half(values, where)
    values = _as_list(values, f"{where}: token_logprobs", "numbers", MissingLogprobsError)
    low, high = _LOGPROBS
    for i, value in enumerate(values):
        if not _is_real(value) or not low < value < high:
            raise MissingLogprobsError(
                f"{where}: the log-prob of token {i} is {shown(value)}; "
                "it must be a finite number and <= 0"
            )
    return [float(value) for value in values]


def _temperature(value: Any, where: str) -> float:
    if value is None:
        return 1.0
    low, high = TEMPERATURES
    if not _is_real(value) or not low <= value <= high:
        raise DataError(
            f"{where}: temperature is {shown(value)}; it must be the number that the log-probs "
            f"are taken at, from {low:g} to {high:g} (1 for greedy decoding)"
        )
    return float(value)


def _version(value: Any, where: str) -> int:
    if value is None:
        return -1
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not 0 <= int(value) <= _LARGEST_VERSION:
        raise DataError(
            f"{where}: policy_version is {shown(value)}; it must be a whole number from 0, "
            "or None if it is not known"
        )
    return int(value)


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _as_list(values: Any, where: str, kind: str, error: type[DataError] = DataError) -> list[Any]:
    """The values of a list, a tuple or a numpy array as a list."""
    if isinstance(values, list | tuple):
        return list(values)
    if isinstance(values, np.ndarray) and values.ndim == 1:
        return values.tolist()
    raise error(f"{where} is {shown(values)}; it must be a list of {kind}")


def _refuse_half(logprobs: Any, where: str) -> None:
    """Refuse log-probs of 16 bits: what their rounding lost, no conversion brings back."""
    first = logprobs if hasattr(logprobs, "dtype") else None
    if isinstance(logprobs, list | tuple) and logprobs:
        first = logprobs[0]
    dtype = getattr(first, "dtype", None)
    if getattr(dtype, "itemsize", 4) < 4:
        raise MissingLogprobsError(
            f"{where}: its log-probs are {dtype}; their rounding alone is as wide as the clip "
            "range of GSPO. Compute log_softmax in float32 and keep float32"
        )
