"""Read what training needs from a `Choice`: token ids, their log-probs, temperature, version."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np

from gspo.core.errors import DataError, MissingLogprobsError, shown
from gspo.core.options import TEMPERATURES
from gspo.data.expert_choices import decode_expert_choices

_LARGEST_ID = 2**31 - 1  # token ids are stored as int32
_LARGEST_VERSION = 2**63 - 1
_LOGPROBS = (-1e30, 1e-5)
"""A log-prob of 0 may come out of float32 a little above it."""


@dataclass(frozen=True)
class Turn:
    """One Choice: what the engine was given and what it sampled. A list is empty if it is missing.

    Attributes:
        prompt: token ids that the engine was given.
        tokens: token ids that it sampled.
        logprobs: of the sampled tokens, at `temperature`.
        temperature: 1 if the Choice does not say.
        policy_version: of the weights that sampled; -1 if the Choice does not say.
        policy_versions: of each token's, if they differ; else empty.
        expert_choices: [R, N, K] experts that computed the R = prompt + tokens - 1 first tokens;
            None if the Choice has none.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    temperature: float = 1.0
    policy_version: int = -1
    expert_choices: np.ndarray | None = None
    policy_versions: tuple[int, ...] = ()


def read_turn(choice: Any, where: str) -> Turn:
    """Read a Choice that is to be trained on. `where` names it in errors.

    Raises:
        MissingLogprobsError: it has no token ids or no log-probs, or not one for each token.
        DataError: see `read_fields`.
    """
    turn = read_fields(choice, where)
    named = {
        "token_ids": turn.tokens,
        "prompt_token_ids": turn.prompt,
        "log-probs": turn.logprobs,
    }
    if missing := [name for name, values in named.items() if not values]:
        raise MissingLogprobsError(
            f"{where} has no {' and no '.join(missing)}: roll out through model.openai_client() "
            "of a registered TrainableModel, whose choices always carry them"
        )
    if len(turn.tokens) != len(turn.logprobs):
        raise MissingLogprobsError(
            f"{where}: {len(turn.tokens)} token ids, {len(turn.logprobs)} log-probs"
        )
    return turn


def read_fields(choice: Any, where: str) -> Turn:
    """Check the fields of a Choice that training reads. Each of them may be missing.

    Raises:
        MissingLogprobsError: log-probs that are no numbers, not finite, above 0 or of 16 bits.
        DataError: token ids that are no whole numbers, or a temperature or policy version that
            means nothing, or expert choices that are damaged.
    """
    prompt = _token_ids(choice, "prompt_token_ids", where)
    tokens = _token_ids(choice, "token_ids", where)
    temperature = getattr(choice, "temperature", None)
    low, high = TEMPERATURES
    if temperature is not None and not _is_number(temperature, numbers.Real, low, high):
        raise DataError(
            f"{where}: temperature is {shown(temperature)}; it must be the number that the "
            f"log-probs are taken at, from {low:g} to {high:g} (1 for greedy decoding)"
        )
    version = getattr(choice, "policy_version", None)
    if version is not None and not _is_number(version, numbers.Integral, 0, _LARGEST_VERSION):
        raise DataError(
            f"{where}: policy_version is {shown(version)}; it must be a whole number from 0, "
            "or None if it is not known"
        )
    versions = getattr(choice, "policy_versions", None)
    versions = _as_list(versions, DataError, f"{where}: policy_versions", "whole numbers")
    odd = _first_odd(versions, int, numbers.Integral, 0, _LARGEST_VERSION)
    if odd is not None or len(versions) not in (0, len(tokens)):
        raise DataError(
            f"{where}: policy_versions is {shown(versions)}; it must be {len(tokens)} whole "
            "numbers from 0, one for each token, or None if all are of policy_version"
        )
    experts = getattr(choice, "routed_experts", None) if prompt and tokens else None
    return Turn(
        prompt=prompt,
        tokens=tokens,
        logprobs=_logprobs(sampled_logprobs(choice), where),
        temperature=1.0 if temperature is None else float(temperature),
        policy_version=-1 if version is None else int(version),
        expert_choices=decode_expert_choices(experts, len(prompt) + len(tokens) - 1, where),
        policy_versions=tuple(int(number) for number in versions),
    )


def sampled_logprobs(choice: Any) -> Any:
    """Log-probs of a Choice's tokens: gspo's field, else OpenAI's; None if it has neither."""
    logprobs = getattr(choice, "token_logprobs", None)
    content = getattr(getattr(choice, "logprobs", None), "content", None)
    if logprobs is None and isinstance(content, list):
        logprobs = [getattr(entry, "logprob", None) for entry in content]
    return logprobs


def _token_ids(choice: Any, name: str, where: str) -> list[int]:
    values = _as_list(getattr(choice, name, None), DataError, f"{where}: {name}", "whole numbers")
    i = _first_odd(values, int, numbers.Integral, 0, _LARGEST_ID)
    if i is not None:
        raise DataError(
            f"{where}: {name}[{i}] is {shown(values[i])}; token ids are whole numbers from 0 up to "
            "the model's vocabulary"
        )
    return [int(value) for value in values]


def _logprobs(values: Any, where: str) -> list[float]:
    first = values[0] if isinstance(values, list | tuple) and values else values
    dtype = getattr(first, "dtype", None)
    if getattr(dtype, "itemsize", 4) < 4:  # no conversion brings back what rounding lost
        raise MissingLogprobsError(
            f"{where}: its log-probs are {dtype}; their rounding alone is as wide as the clip "
            "range of GSPO. Compute log_softmax in float32 and keep float32"
        )
    values = _as_list(values, MissingLogprobsError, f"{where}: token_logprobs", "numbers")
    i = _first_odd(values, float, numbers.Real, *_LOGPROBS)
    if i is not None:
        raise MissingLogprobsError(
            f"{where}: the log-prob of token {i} is {shown(values[i])}; "
            "it must be a finite number and <= 0"
        )
    return [float(value) for value in values]


def _as_list(values: Any, error: type[DataError], where: str, kind: str) -> list[Any]:
    """The values of a list, a tuple or a numpy array as a list; [] for None."""
    if values is None or isinstance(values, list | tuple):
        return list(values or ())
    if isinstance(values, np.ndarray) and values.ndim == 1:
        return values.tolist()
    raise error(f"{where} is {shown(values)}; it must be a list of {kind}")


def _first_odd(
    values: list[Any], usual: type, kind: type, low: int | float, high: int | float
) -> int | None:
    """The index of the first value that is no number of this kind from `low` to `high`, or None.

    >>> _first_odd([3, -1, 4], int, numbers.Integral, 0, 9)
    1
    """
    if set(map(type, values)) <= {usual}:  # a choice has thousands of them: fast if all are usual
        array = np.array(values)
        good = (array >= low) & (array <= high)
        return None if good.all() else int(good.argmin())
    odd = (i for i, value in enumerate(values) if not _is_number(value, kind, low, high))
    return next(odd, None)


def _is_number(value: Any, kind: type, low: int | float, high: int | float) -> bool:
    """Whether a value is a number in a range. numpy's scalars are numbers; True is none."""
    fits = isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high
    return bool(fits)  # a comparison of numpy scalars is no bool
