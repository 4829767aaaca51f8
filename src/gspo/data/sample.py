"""Trajectory -> samples: the token sequences that the model really saw and produced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np

from gspo.core.errors import DataError, MissingLogprobsError, SampleTooLongError
from gspo.data.expert_choices import joined_expert_choices
from gspo.data.turn import Turn, read_turn
from gspo.trajectories import Trajectory


class Split(NamedTuple):
    """Why a sample does not go on where the one before it ended.

    Attributes:
        reason: one of `SPLIT_REASONS`.
        turn: the assistant turn whose prompt does not extend the tokens before it.
        token: the first one that differs, counted from 0.
    """

    reason: str
    turn: int
    token: int


SPLIT_REASONS = {
    "shorter": "the prompt is shorter: earlier turns were left out",
    "start": "the text before the first answer changed: its tools, system or first messages",
    "answer": "an earlier answer of the model was written in another way, or a part of it left out",
    "between": "a message after an answer changed",
    "history": "another history of the trajectory begins, such as a sub-agent's",
}
"""Reason of a split -> what it says of the prompt; `docs/tools.md` says what to do."""


@dataclass(frozen=True)
class Sample:
    """One token sequence of L tokens, as the engine saw it. Arrays have shape [L].

    Attributes:
        tokens: prompt and completions, int64.
        ratio_mask: tokens that the policy sampled: those that are trained on.
        old_logprobs: float32 log-probs of the sampled tokens under pi_old, which ratios are taken
            against: the engine's, unless the trainer computed its own; 0 elsewhere.
        sampling_logprobs: float32 log-probs under mu, the engine that sampled; 0 elsewhere.
        temperatures: float32 temperature that `old_logprobs` were taken at; 1 elsewhere.
        turn_ids: assistant turn of each sampled token, counted over the trajectory; -1 elsewhere.
        policy_versions: version of the weights that sampled each token; -1 elsewhere, and if the
            engine didn't tell.
        trajectory_id, group_id: position of the trajectory and of its group in the rollout batch.
        advantage: A_i of the trajectory.
        expert_choices: [R, N, K] experts that computed the first R tokens, K in each of N layers;
            or None. The last sampled token never went through the engine: there R is L - 1.
        altered_tokens: sampled tokens that were drawn from another distribution than that of
            `sampling_logprobs`.
        altered_by: names of the sampling parameters because of which they were.
        turn_advantages: A_ik of each turn of the trajectory, where turns have advantages of their
            own; else empty.
        split: why it is not one with the trajectory's sample before it; None for the first one.
    """

    tokens: np.ndarray
    ratio_mask: np.ndarray
    old_logprobs: np.ndarray
    sampling_logprobs: np.ndarray
    temperatures: np.ndarray
    turn_ids: np.ndarray
    policy_versions: np.ndarray
    trajectory_id: int
    group_id: int
    advantage: float
    expert_choices: np.ndarray | None = None
    altered_tokens: int = 0
    altered_by: frozenset[str] = frozenset()
    turn_advantages: tuple[float, ...] = ()
    split: Split | None = None

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

    @property
    def has_signal(self) -> bool:
        """Whether any turn of its trajectory has an advantage."""
        return any(value != 0 for value in self.turn_advantages or (self.advantage,))

    @property
    def token_advantages(self) -> np.ndarray:
        """[L] float32: the advantage of each sampled token's turn; 0 elsewhere."""
        if not self.turn_advantages:
            return np.where(self.ratio_mask, np.float32(self.advantage), np.float32(0))
        return np.array([*self.turn_advantages, 0], dtype=np.float32)[self.turn_ids]


TrajectorySamples: TypeAlias = tuple[Sample, ...]
"""The samples of one trajectory, in the order of its turns."""


def flat(trajectories: Iterable[TrajectorySamples]) -> list[Sample]:
    """The samples of all trajectories, one after the other."""
    return [sample for samples in trajectories for sample in samples]


def trajectory_samples(
    trajectory: Trajectory,
    *,
    trajectory_id: int = 0,
    group_id: int = 0,
    advantage: float = 0.0,
    turn_advantages: Sequence[float] = (),
    max_tokens: int | None = None,
    vocabulary: int | None = None,
    where: str | None = None,
) -> TrajectorySamples:
    """The samples of one trajectory: one, or more if a prompt doesn't extend the last tokens.

    The turns of its additional histories follow those of its own; all of them share its advantage.

    Args:
        trajectory: with at least one Choice.
        trajectory_id, group_id, advantage, turn_advantages: of the samples.
        max_tokens: the model's context; None: any length.
        vocabulary: tokens that the model has a probability for; None: any token id.
        where: names the trajectory in errors; None: by its two numbers.

    Raises:
        MissingLogprobsError: no Choice, or one without token ids or log-probs.
        DataError: a Choice whose fields mean nothing (see `read_fields`), or a token id outside
            the vocabulary.
        SampleTooLongError: a sample is longer than `max_tokens`.
    """
    where = where or f"group {group_id}, trajectory {trajectory_id}"
    turns, firsts = _turns(trajectory, where)
    if not turns:
        raise MissingLogprobsError(
            f"{where} has no Choice: append response.choices[0] to messages_and_choices, "
            "not its text, so that the sampled tokens are known; inside art.trajectory(), ask "
            "through model.openai_client() or at t.base_url"
        )
    starts: dict[int, Split | None] = {0: None}  # first turn of each sample, and why
    for number, (before, turn) in enumerate(pairwise(turns), 1):
        tokens = [*before.prompt, *before.tokens]
        if turn.prompt[: len(tokens)] != tokens:
            split = _split(turns[max(starts) : number], turn.prompt, number)
            starts[number] = split._replace(reason="history") if number in firsts else split
    edges = [*starts, len(turns)]
    ids, own = (trajectory_id, group_id, advantage), tuple(turn_advantages)
    samples = tuple(
        replace(sample_of(turns[start:end], start, *ids), turn_advantages=own, split=starts[start])
        for start, end in pairwise(edges)
    )
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


def _split(turns: Sequence[Turn], prompt: Sequence[int], number: int) -> Split:
    """Why `prompt`, of turn `number`, does not extend the tokens of `turns`."""
    tokens = [*turns[-1].prompt, *turns[-1].tokens]
    pairs = enumerate(zip(tokens, prompt, strict=False))
    token = next((i for i, (old, new) in pairs if old != new), None)
    if token is None:
        return Split("shorter", number, len(prompt))
    if token < len(turns[0].prompt):
        return Split("start", number, token)
    spans = [(len(turn.prompt), len(turn.prompt) + len(turn.tokens)) for turn in turns]
    answered = any(start <= token < end for start, end in spans)
    return Split("answer" if answered else "between", number, token)


def _turns(trajectory: Trajectory, where: str) -> tuple[list[Turn], set[int]]:
    """The model's turns in all histories of a trajectory, and the numbers of each one's first."""
    turns: list[Turn] = []
    firsts: set[int] = set()
    for number, history in enumerate(trajectory.histories()):
        place = f"{where}, additional history {number - 1}" if number else where
        choices = enumerate(history.choices())
        firsts.add(len(turns))
        turns += [read_turn(choice, f"{place}, choice {c}") for c, choice in choices]
    return turns, firsts


def sample_of(
    turns: Sequence[Turn],
    first: int = 0,
    trajectory_id: int = 0,
    group_id: int = 0,
    advantage: float = 0.0,
) -> Sample:
    """The sample of turns that each extend the one before; `first` is the number of the first.

    >>> sample = sample_of([Turn([1], [2], [-0.5]), Turn([1, 2, 3], [4], [-2.0])])
    >>> sample.tokens.tolist(), sample.turn_ids.tolist()
    ([1, 2, 3, 4], [-1, 0, -1, 1])
    >>> sample.old_logprobs.tolist()
    [0.0, -0.5, 0.0, -2.0]
    """
    tokens = [*turns[-1].prompt, *turns[-1].tokens]
    length = len(tokens)
    mask = np.zeros(length, dtype=bool)
    logprobs = np.zeros(length, dtype=np.float32)
    temperatures = np.ones(length, dtype=np.float32)
    turn_ids = np.full(length, -1, dtype=np.int64)
    versions = np.full(length, -1, dtype=np.int64)
    expert_choices = None
    for number, turn in enumerate(turns, first):
        span = slice(len(turn.prompt), len(turn.prompt) + len(turn.tokens))
        mask[span] = True
        logprobs[span] = turn.logprobs
        temperatures[span] = turn.temperature
        turn_ids[span] = number
        versions[span] = turn.policy_versions or turn.policy_version
        expert_choices = joined_expert_choices(expert_choices, turn.expert_choices)
    return Sample(
        tokens=np.asarray(tokens, dtype=np.int64),
        ratio_mask=mask,
        old_logprobs=logprobs,
        sampling_logprobs=logprobs,
        temperatures=temperatures,
        turn_ids=turn_ids,
        policy_versions=versions,
        trajectory_id=trajectory_id,
        group_id=group_id,
        advantage=advantage,
        expert_choices=expert_choices,
        altered_tokens=sum(len(turn.tokens) for turn in turns if turn.altered_by),
        altered_by=frozenset(name for turn in turns for name in turn.altered_by),
    )


def split_counts(samples: Iterable[Sample]) -> dict[str, int]:
    """Reason -> how many samples begin for it; only those that occur."""
    reasons = [sample.split.reason for sample in samples if sample.split is not None]
    return {reason: reasons.count(reason) for reason in SPLIT_REASONS if reason in reasons}


def unit_count(samples: Sequence[Sample], unit: str) -> int:
    """Sequences that a trajectory's samples hold: one, or one for each of its turns."""
    if unit == "trajectory":
        return 1
    return len({int(turn) for s in samples for turn in s.turn_ids[s.ratio_mask]})
