"""Trajectory -> samples: the token sequences that the model really saw and produced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gspo.batch.routes import decode_routes, joined
from gspo.errors import DataError, MissingLogprobsError, SampleTooLongError
from gspo.trajectory import Trajectory, TrajectoryGroup


@dataclass(frozen=True)
class Sample:
    """One token sequence of L tokens, as the engine saw it. Arrays have shape [L].

    Attributes:
        tokens: prompt and completions, int64.
        ratio_mask: tokens that the policy sampled.
        loss_mask: tokens that are trained on, a subset.
        old_logprobs: float32 log-probs of the sampled tokens under pi_old, which ratios are taken
            against: the engine's, unless the trainer computed its own; 0 elsewhere.
        sampling_logprobs: float32 log-probs under mu, the engine that sampled; 0 elsewhere.
        temperatures: float32 temperature that `old_logprobs` were taken at.
        turn_ids: assistant turn of each sampled token, counted over the trajectory; -1 elsewhere.
        policy_versions: version of the weights that sampled each token; -1 elsewhere, and where
            the engine didn't tell.
        trajectory_id, group_id: position of the trajectory and of its group in the batch.
        advantage: A_i of the trajectory.
        routes: [R, layers, k] experts that computed the first R tokens, or None. The last sampled
            token never went through the engine, so R is L - 1 there.
    """

    tokens: np.ndarray
    ratio_mask: np.ndarray
    loss_mask: np.ndarray
    old_logprobs: np.ndarray
    sampling_logprobs: np.ndarray
    temperatures: np.ndarray
    turn_ids: np.ndarray
    policy_versions: np.ndarray
    trajectory_id: int
    group_id: int
    advantage: float
    routes: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("old_logprobs", "sampling_logprobs"):
            if (dtype := getattr(self, name).dtype) != np.float32:
                raise TypeError(f"{name} are {dtype}: l_i needs float32")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def sampled(self) -> int:
        """Number of sampled tokens."""
        return int(self.ratio_mask.sum())


@dataclass(frozen=True)
class Turn:
    """One Choice: what the engine saw, and what it sampled."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    temperature: float
    policy_version: int
    routes: np.ndarray | None = None


def check_groups(groups: Sequence[TrajectoryGroup]) -> None:
    """Refuse batches that cannot be trained on, before anything is written.

    Raises:
        DataError: no groups, a group of one trajectory, or a reward that is NaN or infinite.
    """
    if not groups:
        raise DataError("train got an empty list of trajectory groups: give at least one")
    for g, group in enumerate(groups):
        if not isinstance(group, TrajectoryGroup):
            raise DataError(f"group {g} is a {type(group).__name__}, not a TrajectoryGroup")
        if group.size > len(group) + len(group.exceptions):
            raise DataError(
                f"group {g} holds coroutines that have not run: "
                "await it, or pass it through gather_trajectory_groups"
            )
        if len(group) < 2:
            raise DataError(
                f"group {g} has {len(group)} trajectories ({len(group.exceptions)} failed): "
                "an advantage compares rollouts of one prompt, so a group needs at least 2"
            )
        for t, trajectory in enumerate(group):
            if not math.isfinite(trajectory.reward):
                raise DataError(
                    f"group {g}, trajectory {t}: reward is {trajectory.reward}; "
                    "rewards must be finite numbers"
                )


def trajectory_samples(
    trajectory: Trajectory,
    *,
    trajectory_id: int = 0,
    group_id: int = 0,
    advantage: float = 0.0,
    max_tokens: int | None = None,
) -> list[Sample]:
    """The samples of one trajectory: one, or more where a prompt doesn't extend the last tokens.

    Raises:
        MissingLogprobsError: no Choice, or one without token ids or log-probs.
        SampleTooLongError: a sample is longer than `max_tokens`.
    """
    where = f"group {group_id}, trajectory {trajectory_id}"
    turns = [_turn(choice, f"{where}, choice {c}") for c, choice in enumerate(trajectory.choices())]
    if not turns:
        raise MissingLogprobsError(
            f"{where} has no Choice: append response.choices[0] to messages_and_choices, "
            "not its text, so that the sampled tokens are known"
        )
    samples: list[Sample] = []
    builder = _Builder()
    for index, turn in enumerate(turns):
        if not builder.extends(turn.prompt):
            samples.append(builder.build(trajectory_id, group_id, advantage))
            builder = _Builder()
        builder.add(turn, index)
    samples.append(builder.build(trajectory_id, group_id, advantage))
    for sample in samples:
        if max_tokens is not None and len(sample) > max_tokens:
            raise SampleTooLongError(
                f"{where} has {len(sample)} tokens, but the model's context is {max_tokens}: "
                "shorten the rollout (max_tokens), or set on_too_long='drop' in dev.TrainConfig"
            )
    return samples


class _Builder:
    """Collects the turns of one sample."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.spans: list[tuple[int, int, Turn]] = []
        self.routes: np.ndarray | None = None

    def extends(self, prompt: list[int]) -> bool:
        return prompt[: len(self.tokens)] == self.tokens

    def add(self, turn: Turn, index: int) -> None:
        self.tokens = [*turn.prompt, *turn.tokens]
        self.spans.append((index, len(turn.prompt), turn))
        self.routes = joined(self.routes, turn.routes)

    def build(self, trajectory_id: int, group_id: int, advantage: float) -> Sample:
        length = len(self.tokens)
        mask = np.zeros(length, dtype=bool)
        logprobs = np.zeros(length, dtype=np.float32)
        temperatures = np.ones(length, dtype=np.float32)
        turn_ids = np.full(length, -1, dtype=np.int64)
        versions = np.full(length, -1, dtype=np.int64)
        for index, start, turn in self.spans:
            span = slice(start, start + len(turn.tokens))
            mask[span] = True
            logprobs[span] = turn.logprobs
            temperatures[span] = turn.temperature
            turn_ids[span] = index
            versions[span] = turn.policy_version
        return Sample(
            tokens=np.asarray(self.tokens, dtype=np.int64),
            ratio_mask=mask,
            loss_mask=mask.copy(),
            old_logprobs=logprobs,
            sampling_logprobs=logprobs,
            temperatures=temperatures,
            turn_ids=turn_ids,
            policy_versions=versions,
            trajectory_id=trajectory_id,
            group_id=group_id,
            advantage=advantage,
            routes=self.routes,
        )


def _turn(choice: Any, where: str) -> Turn:
    """Read gspo's fields of a Choice."""
    tokens = getattr(choice, "token_ids", None)
    prompt = getattr(choice, "prompt_token_ids", None)
    logprobs = sampled_logprobs(choice)
    _refuse_half(logprobs, where)
    missing = [
        name
        for name, value in (
            ("token_ids", tokens),
            ("prompt_token_ids", prompt),
            ("log-probs", logprobs),
        )
        if not value
    ]
    if missing or not tokens or not prompt or not logprobs:
        raise MissingLogprobsError(
            f"{where} has no {' and no '.join(missing)}: roll out through model.openai_client() "
            "of a registered TrainableModel, whose choices always carry them"
        )
    if len(tokens) != len(logprobs):
        raise MissingLogprobsError(f"{where}: {len(tokens)} token ids, {len(logprobs)} log-probs")
    bad = next((i for i, value in enumerate(logprobs) if not -1e30 < value < 1e-5), None)
    if bad is not None:
        raise MissingLogprobsError(
            f"{where}: the log-prob of token {bad} is {logprobs[bad]}; it must be finite and <= 0"
        )
    version = getattr(choice, "policy_version", None)
    return Turn(
        prompt=list(prompt),
        tokens=list(tokens),
        logprobs=list(logprobs),
        temperature=float(getattr(choice, "temperature", None) or 1.0),
        policy_version=-1 if version is None else int(version),
        routes=decode_routes(
            getattr(choice, "routed_experts", None), len(prompt) + len(tokens) - 1, where
        ),
    )


def sampled_logprobs(choice: Any) -> Any:
    """Log-probs of a Choice's tokens: gspo's field, else OpenAI's own; None where it has none."""
    logprobs = getattr(choice, "token_logprobs", None)
    if logprobs is None and choice.logprobs is not None and choice.logprobs.content is not None:
        logprobs = [entry.logprob for entry in choice.logprobs.content]
    return logprobs


def unit_count(samples: Sequence[Sample], unit: str) -> int:
    """Sequences that a trajectory's samples hold: one, or one for each of its turns."""
    if unit == "trajectory":
        return 1
    turns = {int(turn) for s in samples for turn in s.turn_ids[s.ratio_mask]}
    return len(turns)


def _refuse_half(logprobs: Any, where: str) -> None:
    """Refuse log-probs that are numbers of 16 bits: what those lost, no upcast brings back."""
    first = logprobs if hasattr(logprobs, "dtype") else next(iter(logprobs or ()), None)
    dtype = getattr(first, "dtype", None)
    if dtype is not None and dtype.itemsize < 4:
        raise MissingLogprobsError(
            f"{where}: its log-probs are {dtype}; their rounding alone is as wide as the clip "
            "range of GSPO. Compute log_softmax in float32 and keep float32"
        )
