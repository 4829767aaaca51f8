"""Trajectory groups with every kind of common prefix."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from openai.types.chat.chat_completion import Choice

import gspo as art
from gspo.data.sample import Sample
from support import choice, trajectory


def branching_groups(
    *, groups: int = 3, size: int = 4, seed: int = 0, vocabulary: int = 100, system: int = 20
) -> list[art.TrajectoryGroup]:
    """Prompts with a system prompt in common; equal and nested completions; several turns.

    Old log-probs are random: off-policy. Each group has a trajectory whose second turn extends the
    first, and one whose two further turns don't (their history is cut).
    """
    rng = random.Random(seed)

    def text(low: int, high: int) -> list[int]:
        return [rng.randrange(6, vocabulary) for _ in range(rng.randint(low, high))]

    def turn(prompt: Sequence[int], tokens: Sequence[int]) -> Choice:
        return choice(tokens, prompt, [-rng.uniform(0.1, 9.0) for _ in tokens], policy_version=0)

    head = text(system, system)
    out = []
    for _ in range(groups):
        prompt = head + text(1, 9)
        answers = [text(1, 20) for _ in range(size)]
        answers += [answers[0], answers[0][:1], answers[0] + text(1, 3)]
        own = [[turn(prompt, answer)] for answer in answers]
        first = text(18, 20)
        history = prompt + first
        own.append([turn(prompt, first), turn(history + text(3, 3), text(4, 6))])
        cut = prompt + first[:17] + text(2, 5)
        own.append([turn(prompt, first), turn(cut, text(5, 9)), turn(cut[:-1] + text(3, 3), [7])])
        out.append(art.TrajectoryGroup([trajectory(rng.random(), *turns) for turns in own]))
    return out


def small_sample(tokens: Sequence[int], prompt: int, number: int = 0, group: int = 0) -> Sample:
    """A sample of a prompt and one completion."""
    mask = np.arange(len(tokens)) >= prompt
    return Sample(
        tokens=np.array(tokens, dtype=np.int64),
        ratio_mask=mask,
        old_logprobs=np.where(mask, -1, 0).astype(np.float32),
        sampling_logprobs=np.where(mask, -1, 0).astype(np.float32),
        temperatures=np.ones(len(tokens), np.float32),
        turn_ids=np.where(mask, 0, -1),
        policy_versions=np.where(mask, 0, -1),
        trajectory_id=number,
        group_id=group,
        advantage=1.0,
    )
