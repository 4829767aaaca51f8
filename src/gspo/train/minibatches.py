"""Trajectory groups -> a rollout batch -> its minibatches -> the microbatches of each."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from gspo import dev
from gspo.core.errors import DataError, SampleTooLongError
from gspo.core.timing import span
from gspo.data.check import check_groups
from gspo.data.packing import Microbatch, pack
from gspo.data.sample import TrajectorySamples, flat, trajectory_samples
from gspo.objective import Objective, advantages, turn_advantages
from gspo.policy.policy import Policy
from gspo.train.microbatch_memory import microbatch_tokens
from gspo.train.settings import Settings, resolve
from gspo.trajectories import Trajectory, TrajectoryGroup

ACTIVATION_BYTES = 2 * 2**30
_FEWEST, _MOST = 256, 16_384


@dataclass(frozen=True)
class RolloutBatch:
    """What one call of `train` works on.

    Attributes:
        samples: for each trajectory its samples, group after group; `advantage` is set.
        rewards: one for each trajectory.
        dropped: trajectories that were too long and left out, by the user's choice.
        stale: those that were too old and left out.
        unread: turn rewards were given that are not in the rewards, and the method reads none.
    """

    samples: tuple[TrajectorySamples, ...]
    rewards: tuple[float, ...]
    dropped: int
    stale: int = 0
    unread: bool = False

    @property
    def groups(self) -> tuple[int, ...]:
        """The group of each trajectory."""
        return tuple(samples[0].group_id for samples in self.samples)

    def with_signal(self) -> RolloutBatch:
        """The batch without the groups in which each advantage is 0."""
        signal = self._groups_with_signal()
        chosen = [i for i, group in enumerate(self.groups) if group in signal]
        samples = tuple(self.samples[i] for i in chosen)
        return replace(self, samples=samples, rewards=tuple(self.rewards[i] for i in chosen))

    @property
    def flat_groups(self) -> int:
        """Groups in which each advantage is 0."""
        return len(set(self.groups) - self._groups_with_signal())

    def _groups_with_signal(self) -> set[int]:
        return {samples[0].group_id for samples in self.samples if samples[0].has_signal}


def why_no_update(trajectories: int, too_long: int, stale: int = 0) -> str:
    """Why no optimizer step was taken on a rollout batch.

    Args:
        trajectories: how many had a sample.
        too_long, stale: how many were dropped.

    >>> why_no_update(0, 4)
    'all 4 trajectories are longer than the context'
    """
    if trajectories == 0:
        reasons = {"longer than the context": too_long, "older than max_staleness": stale}
        why = " or ".join(reason for reason, count in reasons.items() if count)
        return f"all {too_long + stale} trajectories are {why}"
    return "all advantages are 0: each group has equal rewards or a single trajectory"


@span("packing")
def prepare(
    groups: Sequence[TrajectoryGroup],
    settings: Settings | None = None,
    *,
    context: int,
    vocabulary: int | None = None,
    version: int | None = None,
) -> RolloutBatch:
    """Check the groups, make samples of their tokens, and compute the advantages.

    Nothing is tokenized. Advantages are computed over the whole group, before anything is dropped.

    Args:
        groups: with a reward for each trajectory.
        settings: how advantages are made, and whether trajectories may be dropped. None: GSPO's.
        context, vocabulary: the model's, in tokens; a vocabulary of None takes any token id.
        version: of the weights before the update, which `max_staleness` is counted from.

    Raises:
        DataError: see `check_groups` and `trajectory_samples`; an advantage beyond float32; turn
            rewards of some trajectories of a group only.
    """
    settings = settings or resolve()
    check_groups(groups)
    numbered = [(g, t, one) for g, group in enumerate(groups) for t, one in enumerate(group)]
    shaped = [shaped_reward(trajectory, settings) for _, _, trajectory in numbered]
    kind, group_ids = settings.preset.advantage, torch.tensor([g for g, _, _ in numbered])
    outcomes = advantages(kind, torch.tensor(shaped, dtype=torch.float64), group_ids)
    values, turns = outcomes.tolist(), _turn_rewards(groups)
    unread = settings.turn_weight == 0
    weights = settings.turn_weight, settings.turn_discount
    read = [[] for _ in turns] if unread else turns
    by_turn = turn_advantages(kind, read, group_ids, outcomes, *weights)
    trained: list[TrajectorySamples] = []
    rewards: list[float] = []
    stale = 0
    for i, (g, t, trajectory) in enumerate(numbered):
        largest = max([values[i], *by_turn[i]], key=abs)
        if abs(largest) > torch.finfo(torch.float32).max:
            raise DataError(
                f"group {g}: an advantage is {largest:.3g}, which is beyond float32: divide the "
                "rewards by their size, or use an algorithm that divides by their spread (gspo)"
            )
        try:
            samples = trajectory_samples(
                trajectory,
                trajectory_id=i,
                group_id=g,
                advantage=values[i],
                turn_advantages=by_turn[i],
                max_tokens=context,
                vocabulary=vocabulary,
                where=f"group {g}, trajectory {t}",
            )
        except SampleTooLongError:
            if settings.on_too_long == "error":
                raise
            continue
        if version is not None and is_stale(samples, version, settings.max_staleness):
            stale += 1
            continue
        trained.append(samples)
        rewards.append(float(trajectory.reward))
    dropped = len(numbered) - len(trained) - stale
    return RolloutBatch(tuple(trained), tuple(rewards), dropped, stale, unread and _is_more(groups))


def _is_more(groups: Sequence[TrajectoryGroup]) -> bool:
    """Whether rewards of turns say what no trajectory's reward has in its sum."""
    given = [t for group in groups for t in group if t.turn_rewards is not None]
    return any(not math.isclose(sum(t.turn_rewards or ()), t.reward, abs_tol=1e-9) for t in given)


def _turn_rewards(groups: Sequence[TrajectoryGroup]) -> list[list[float]]:
    """The rewards of each trajectory's turns; an empty list where a group gives none.

    Raises:
        DataError: some trajectories of a group have them and others don't.
    """
    for g, group in enumerate(groups):
        given = [trajectory.turn_rewards is not None for trajectory in group]
        if any(given) and not all(given):
            raise DataError(
                f"group {g}: trajectory {given.index(True)} has turn_rewards, trajectory "
                f"{given.index(False)} has none: give them to all of a group, or to none"
            )
    return [[float(r) for r in t.turn_rewards or ()] for group in groups for t in group]


def is_stale(samples: TrajectorySamples, version: int, most: int | None) -> bool:
    """Whether a trajectory's oldest token is more than `most` versions behind `version`.

    Tokens whose version is not known don't count.
    """
    if most is None:
        return False
    versions = np.concatenate([sample.policy_versions for sample in samples])
    known = versions[versions >= 0]
    return len(known) > 0 and version - int(known.min()) > most


def minibatches(batch: RolloutBatch, count: int, seed: int) -> list[list[TrajectorySamples]]:
    """Trajectories in `count` parts of nearly equal size; groups in random order, kept together.

    There are fewer parts if there are fewer trajectories.
    """
    by_group: dict[int, list[TrajectorySamples]] = {}
    for samples in batch.samples:
        by_group.setdefault(samples[0].group_id, []).append(samples)
    order = sorted(by_group)
    random.Random(seed).shuffle(order)
    units = [samples for group in order for samples in by_group[group]]
    count = min(count, len(units))
    edges = [round(i * len(units) / count) for i in range(count + 1)] if count else [0]
    return [units[a:b] for a, b in itertools.pairwise(edges)]


def with_gradient(
    minibatch: Sequence[TrajectorySamples], objective: Objective
) -> list[TrajectorySamples]:
    """The trajectories that have a gradient: those with an advantage, or all with a KL term."""
    return [s for s in minibatch if objective.kl_coef > 0 or s[0].has_signal]


def microbatches(
    policy: Policy, minibatch: Sequence[TrajectorySamples], settings: Settings, *, replay: bool
) -> list[Microbatch]:
    """The samples of a minibatch, packed; the result of training doesn't depend on how.

    Args:
        policy: for the memory that its activations take.
        minibatch: whole trajectories.
        settings: how many tokens a microbatch has, and whether it shares prompts.
        replay: expert choices will be replayed: tokens are shared only if theirs are the same.
    """
    return pack(
        flat(minibatch),
        settings.packed_sequence_length or _budget(policy),
        settings.sequence_unit,
        share=settings.share_prefixes and policy.shares_prompts,
        replay=replay,
        workers=policy.workers.count,
    )


def _budget(policy: Policy) -> int:
    if policy.device.type == "cuda":
        return microbatch_tokens(policy)
    tokens = token_budget(policy.lm.config.get_text_config(), policy.checkpointing)
    return tokens * policy.workers.parts.size


def token_budget(config: Any, checkpointing: bool) -> int:
    """Tokens of a microbatch whose activations fit `ACTIVATION_BYTES`, on a CPU.

    On a GPU see `microbatch_memory`.

    Args:
        config: the model's text config.
        checkpointing: layers are recomputed in the backward pass.
    """
    fitting = ACTIVATION_BYTES // activation_bytes(config, checkpointing)
    return max(_FEWEST, min(_MOST, fitting))


def activation_bytes(config: Any, checkpointing: bool) -> int:
    """Rough number of bytes of float32 activations per token, kept for the backward pass."""
    width, layers = 4 * config.hidden_size, config.num_hidden_layers
    # About 34 vectors of the hidden width per layer; with checkpointing, those of one layer only.
    return width * (layers + 34) if checkpointing else width * layers * 34


def shaped_reward(trajectory: Trajectory, options: dev.TrainConfig) -> float:
    """The reward that advantages are made of: with DAPO's soft punishment of long completions.

    The punishment is 0 up to overlong_max_tokens - overlong_cache sampled tokens, and falls to -1
    at overlong_max_tokens (arXiv 2503.14476, equation 13). Without these options there is none.
    """
    reward, longest = float(trajectory.reward), options.overlong_max_tokens
    if longest is None or options.overlong_cache is None:
        return reward
    turns = trajectory.sampled_turns()
    length = sum(len(getattr(choice, "token_ids", None) or ()) for choice in turns)
    over = (longest - options.overlong_cache - length) / options.overlong_cache
    return reward + min(0.0, max(-1.0, over))
