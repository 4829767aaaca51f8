"""Read what training needs from a `Choice`: token ids, their log-probs, temperature, version, and
what changed the distribution that the tokens were drawn from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field, SkipValidation, TypeAdapter, ValidationError

from gspo.core.errors import DataError, MissingLogprobsError, shown
from gspo.core.options import TEMPERATURES
from gspo.data.expert_choices import decode_expert_choices

_TokenId = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]  # stored as int32
# A log-prob of 0 may come out of float32 a little above it.
_Logprob = Annotated[float, Field(strict=True, ge=-1e30, le=1e-5, allow_inf_nan=False)]
_Temperature = Annotated[
    float, Field(strict=True, ge=TEMPERATURES[0], le=TEMPERATURES[1], allow_inf_nan=False)
]
_Name = Annotated[str, Field(strict=True, min_length=1, max_length=64)]
_Version = Annotated[int, Field(strict=True, ge=0, le=2**63 - 1)]


@dataclass(frozen=True)
class Turn:
    """One Choice: what the engine was given and what it sampled. A list is empty if it is missing.

    Attributes:
        prompt: token ids that the engine was given.
        tokens: token ids that it sampled.
        logprobs: of the sampled tokens, at `temperature`.
        temperature: 1 if the Choice does not say.
        policy_version: of the weights that sampled; -1 if the Choice does not say.
        expert_choices: [R, N, K] experts that computed the R = prompt + tokens - 1 first tokens;
            None if the Choice has none.
        policy_versions: of each token's weights, if they differ; else empty.
        altered_by: names of the sampling parameters because of which the tokens were drawn from
            another distribution than that of `logprobs`.
    """

    prompt: Annotated[list[_TokenId], Field([], alias="prompt_token_ids")]
    tokens: Annotated[list[_TokenId], Field([], alias="token_ids")]
    logprobs: Annotated[list[_Logprob], Field([], alias="token_logprobs")]
    temperature: _Temperature = 1.0
    policy_version: _Version = -1
    expert_choices: SkipValidation[Any] = None
    policy_versions: tuple[_Version, ...] = ()
    altered_by: tuple[_Name, ...] = ()


_TURN = TypeAdapter(Turn)
_RULES = {
    "prompt_token_ids": "token ids are a list of whole numbers from 0 up to the vocabulary",
    "token_ids": "token ids are a list of whole numbers from 0 up to the vocabulary",
    "token_logprobs": "log-probs are a list of finite numbers <= 0",
    "temperature": "it must be the number that the log-probs are taken at, from "
    f"{TEMPERATURES[0]:g} to {TEMPERATURES[1]:g} (1 for greedy decoding)",
    "policy_version": "it must be a whole number from 0, or None if it is not known",
    "policy_versions": "it must be a list of whole numbers from 0, one for each token",
    "altered_by": "it must be a list of the names of sampling parameters",
}


def read_turn(choice: Any, where: str) -> Turn:
    """Read a Choice that is to be trained on. `where` names it in errors.

    Raises:
        MissingLogprobsError: it has no token ids or no log-probs, or not one for each token.
        DataError: see `read_fields`.
    """
    turn = read_fields(choice, where)
    named = {"token_ids": turn.tokens, "prompt_token_ids": turn.prompt, "log-probs": turn.logprobs}
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
            means nothing, or expert choices that are damaged, or what is no name of a parameter.
    """
    values = {name: _plain(getattr(choice, name, None)) for name in _RULES}
    values["token_logprobs"] = _plain(_logprobs(choice, where))
    try:
        turn = _TURN.validate_python({k: v for k, v in values.items() if v is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name, *index = first["loc"]
        kind = MissingLogprobsError if name == "token_logprobs" else DataError
        place = f"{where}: {name}{index or ''}"
        raise kind(f"{place} is {shown(first['input'])}; {_RULES[str(name)]}") from None
    if len(turn.policy_versions) not in (0, len(turn.tokens)):
        versions = shown(values["policy_versions"])
        raise DataError(f"{where}: policy_versions is {versions}; {_RULES['policy_versions']}")
    if not turn.prompt or not turn.tokens:
        return turn
    experts = getattr(choice, "routed_experts", None)
    count = len(turn.prompt) + len(turn.tokens) - 1
    return replace(turn, expert_choices=decode_expert_choices(experts, count, where))


def _plain(value: Any) -> Any:
    """A value with Python's own numbers in the place of numpy's."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, list | tuple) and not set(map(type, value)) <= {int, float}:
        return [item.item() if isinstance(item, np.generic) else item for item in value]
    return value


def _logprobs(choice: Any, where: str) -> Any:
    """Log-probs of a Choice's tokens: gspo's field, else OpenAI's; None if it has neither."""
    values = getattr(choice, "token_logprobs", None)
    content = getattr(getattr(choice, "logprobs", None), "content", None)
    if values is None and isinstance(content, list):
        values = [getattr(entry, "logprob", None) for entry in content]
    first = values[0] if isinstance(values, list | tuple) and values else values
    dtype = getattr(first, "dtype", None)
    if getattr(dtype, "itemsize", 4) < 4:  # no conversion brings back what rounding lost
        raise MissingLogprobsError(
            f"{where}: its log-probs are {dtype}; their rounding alone is as wide as the clip "
            "range of GSPO. Compute log_softmax in float32 and keep float32"
        )
    return values
