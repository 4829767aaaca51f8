"""Trajectory -> samples: the token sequences that the model really saw and produced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from gspo.core.errors import DataError, MissingLogprobsError, SampleTooLongError
from gspo.data.expert_choices import joined
from gspo.data.sampled import Turn, read_turn
from gspo.trajectory import Trajectory


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


TrajectorySamples: TypeAlias = tuple[Sample, ...]
"""The samples of one trajectory, in the order of its turns."""


def trajectory_samples(
    trajectory: Trajectory,
    *,
    trajectory_id: int = 0,
    group_id: int = 0,
    advantage: float = 0.0,
    max_tokens: int | None = None,
    vocabulary: int | None = None,
    where: str | None = None,
) -> list[Sample]:
    """The samples of one trajectory: one, or more where a prompt doesn't extend the last tokens.

    Args:
        trajectory: with at least one Choice.
        trajectory_id, group_id, advantage: of the samples.
        max_tokens: the model's context; None: any length.
        vocabulary: tokens that the model has a probability for; None: any token id.
        where: names the trajectory in errors; None: its two numbers do.

    Raises:
        MissingLogprobsError: no Choice, or one without token ids or log-probs.
        DataError: a Choice whose fields mean nothing (see `read_fields`), or a token id outside
            the vocabulary.
        SampleTooLongError: a sample is longer than `max_tokens`.
    """
    where = where or f"group {group_id}, trajectory {trajectory_id}"
    choices = enumerate(trajectory.choices())
    turns = [read_turn(choice, f"{where}, choice {c}") for c, choice in choices]
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
        if vocabulary is not None and sample.tokens.max() >= vocabulary:
            raise DataError(
                f"{where} holds token id {sample.tokens.max()}, but the model's vocabulary has "
                f"{vocabulary} entries: were these tokens sampled from another model?"
            )
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


def unit_count(samples: Sequence[Sample], unit: str) -> int:
    """Sequences that a trajectory's samples hold: one, or one for each of its turns."""
    if unit == "trajectory":
        return 1
    turns = {int(turn) for s in samples for turn in s.turn_ids[s.ratio_mask]}
    return len(turns)
