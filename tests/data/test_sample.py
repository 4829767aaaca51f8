"""Trajectory -> samples: what the engine saw, token for token."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat.chat_completion import Choice

import gspo as art
from gspo.core.errors import DataError, MissingLogprobsError, SampleTooLongError
from gspo.data.packing import pack
from gspo.data.sample import (
    Sample,
    Split,
    flat,
    split_counts,
    trajectory_samples,
    unit_count,
)
from gspo.objective import Objective, policy_loss
from gspo.trajectories import History
from support import choice, trajectory


def one(*choices: Choice, **options: Any) -> Sample:
    (sample,) = trajectory_samples(trajectory(0.0, *choices), **options)
    return sample


def test_a_single_turn() -> None:
    turn = choice([7, 8], [1, 2, 3], [-0.5, -2.0], temperature=0.7, policy_version=4)
    sample = one(turn, trajectory_id=5, group_id=2, advantage=-1.5)
    assert sample.tokens.tolist() == [1, 2, 3, 7, 8]
    assert sample.ratio_mask.tolist() == [False, False, False, True, True]
    assert sample.old_logprobs.tolist() == [0, 0, 0, -0.5, -2.0]
    assert sample.temperatures.tolist() == pytest.approx([1, 1, 1, 0.7, 0.7])
    assert sample.turn_ids.tolist() == [-1, -1, -1, 0, 0]
    assert sample.policy_versions.tolist() == [-1, -1, -1, 4, 4]
    assert (sample.trajectory_id, sample.group_id, sample.advantage) == (5, 2, -1.5)
    changing = choice([7, 8], [1, 2, 3], policy_version=4, policy_versions=[4, 5])
    assert one(changing).policy_versions.tolist() == [-1, -1, -1, 4, 5]
    assert (len(sample), sample.sampled) == (5, 2)


def test_the_arrays_have_the_documented_types() -> None:
    sample = one(choice([7], [1]))
    kinds = {name: getattr(sample, name).dtype for name in ("tokens", "turn_ids")}
    assert set(kinds.values()) == {np.dtype(np.int64)}
    assert sample.ratio_mask.dtype == np.dtype(bool)
    assert sample.old_logprobs.dtype == sample.temperatures.dtype == np.dtype(np.float32)


def test_turns_that_extend_each_other_are_one_sample() -> None:
    first = choice([10, 11], [1, 2], [-0.1, -0.2], policy_version=1, temperature=0.5)
    second = choice([12], [1, 2, 10, 11, 3, 4], [-0.3], policy_version=2, temperature=2.0)
    third = choice([13, 14], [1, 2, 10, 11, 3, 4, 12], [-0.4, -0.5], policy_version=3)
    sample = one(first, second, third)
    assert sample.tokens.tolist() == [1, 2, 10, 11, 3, 4, 12, 13, 14]
    assert sample.ratio_mask.tolist() == [bool(x) for x in [0, 0, 1, 1, 0, 0, 1, 1, 1]]
    assert sample.turn_ids.tolist() == [-1, -1, 0, 0, -1, -1, 1, 2, 2]
    assert sample.policy_versions.tolist() == [-1, -1, 1, 1, -1, -1, 2, 3, 3]
    assert sample.temperatures.tolist() == [1, 1, 0.5, 0.5, 1, 1, 2, 1, 1]
    expected = [0, 0, -0.1, -0.2, 0, 0, -0.3, -0.4, -0.5]
    assert sample.old_logprobs.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "prompt",
    [
        [1, 2, 99, 11, 3],  # a sampled token was tokenised anew
        [1, 9, 10, 11, 3],  # an edited prompt
        [1, 2, 10],  # shorter than what was sampled
        [10, 11, 3],  # a window without the start
    ],
)
def test_a_broken_prefix_starts_a_new_sample_of_the_same_trajectory(prompt: list[int]) -> None:
    first, second = choice([10, 11], [1, 2]), choice([12], prompt)
    samples = trajectory_samples(
        trajectory(0.0, first, second), trajectory_id=3, group_id=1, advantage=0.5
    )
    assert [sample.tokens.tolist() for sample in samples] == [[1, 2, 10, 11], [*prompt, 12]]
    assert [sample.sampled for sample in samples] == [2, 1]
    # Tokens sampled in the first turn are context in the second sample: counted once.
    assert samples[1].turn_ids.tolist() == [*[-1] * len(prompt), 1]
    for sample in samples:
        assert (sample.trajectory_id, sample.group_id, sample.advantage) == (3, 1, 0.5)


def test_a_turn_may_extend_the_second_sample() -> None:
    turns = [choice([10], [1]), choice([20], [2]), choice([30], [2, 20, 3])]
    samples = trajectory_samples(trajectory(0.0, *turns))
    assert [sample.turn_ids.tolist() for sample in samples] == [[-1, 0], [-1, 1, -1, 2]]


def test_log_probs_in_the_form_of_vllm() -> None:
    content = [
        {"token": "a", "logprob": -0.25, "top_logprobs": []},
        {"token": "b", "logprob": -0.5, "top_logprobs": []},
    ]
    turn = choice([7, 8], [1], token_logprobs=None, logprobs=None).model_dump()
    for absent in ("token_logprobs", "temperature", "policy_version"):
        del turn[absent]
    vllm = Choice.model_validate(turn | {"logprobs": {"content": content, "refusal": None}})
    sample = one(vllm)
    assert sample.old_logprobs.tolist() == [0, -0.25, -0.5]
    assert sample.temperatures.tolist() == [1, 1, 1]
    assert sample.policy_versions.tolist() == [-1, -1, -1]  # vLLM does not tell


@pytest.mark.parametrize(
    ("field", "named"),
    [
        ("token_ids", "no token_ids"),
        ("prompt_token_ids", "no prompt_token_ids"),
        ("token_logprobs", "no log-probs"),
    ],
)
@pytest.mark.parametrize("value", [None, []])
def test_a_choice_without_what_training_needs_is_named(field: str, named: str, value: Any) -> None:
    turns = [choice([4], [1]), choice([5], [1, 4], **{field: value})]
    with pytest.raises(MissingLogprobsError, match=named) as caught:
        trajectory_samples(trajectory(0.0, *turns), group_id=6, trajectory_id=13)
    assert "group 6, trajectory 13, choice 1" in str(caught.value)
    assert "openai_client()" in str(caught.value)  # the remedy


def test_a_choice_of_another_server_lacks_all_three() -> None:
    message = {"role": "assistant", "content": "x"}
    plain = Choice.model_validate({"index": 0, "finish_reason": "stop", "message": message})
    with pytest.raises(
        MissingLogprobsError, match="no token_ids and no prompt_token_ids and no log-probs"
    ):
        one(plain)


def test_a_trajectory_of_text_only_is_refused() -> None:
    texts = trajectory()
    texts.messages_and_choices = [{"role": "assistant", "content": "text"}]
    with pytest.raises(MissingLogprobsError, match="group 2, trajectory 9 has no Choice"):
        trajectory_samples(texts, group_id=2, trajectory_id=9)


def test_a_log_prob_for_each_token() -> None:
    with pytest.raises(MissingLogprobsError, match="2 token ids, 1 log-probs"):
        one(choice([4, 5], [1], [-1.0]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.5, 2.0])
def test_an_impossible_log_prob_is_refused(bad: float) -> None:
    with pytest.raises(MissingLogprobsError, match=r"choice 0: token_logprobs\[1\] is"):
        one(choice([4, 5, 6], [1], [-1.0, bad, -1.0]))


def test_certain_and_hopeless_tokens_are_accepted() -> None:
    assert one(choice([4, 5], [1], [0.0, -9999.0])).old_logprobs.tolist() == [0, 0.0, -9999.0]


def test_too_long_is_an_error_that_names_it_and_never_a_cut() -> None:
    turn = choice([4, 5], [1, 2, 3])
    assert len(one(turn, max_tokens=5)) == 5
    with pytest.raises(SampleTooLongError, match="group 3, trajectory 8") as caught:
        one(turn, group_id=3, trajectory_id=8, max_tokens=4)
    assert "5 tokens" in str(caught.value)
    assert "4" in str(caught.value)
    assert "on_too_long='drop'" in str(caught.value)


def test_only_the_second_sample_may_be_too_long() -> None:
    turns = [choice([4], [1]), choice([5], [9, 9, 9])]
    with pytest.raises(SampleTooLongError):
        trajectory_samples(trajectory(0.0, *turns), max_tokens=3)


def test_errors_of_samples_are_data_errors() -> None:
    assert issubclass(MissingLogprobsError, DataError)
    assert issubclass(SampleTooLongError, DataError)


def test_the_turns_of_all_samples_of_a_trajectory_are_counted() -> None:
    """Two turns extend one another, the third starts another sample: 1 trajectory, 3 turns."""
    turns = [choice([4, 5], [1, 2]), choice([6], [1, 2, 4, 5, 3]), choice([7], [9])]
    samples = trajectory_samples(trajectory(0.0, *turns))
    assert len(samples) == 2
    assert (unit_count(samples, "trajectory"), unit_count(samples, "turn")) == (1, 3)
    assert (unit_count(samples[:1], "turn"), unit_count(samples[1:], "turn")) == (2, 1)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([1, 2, 10], Split("shorter", 2, 3)),
        ([], None),
        ([9, 2, 10, 11, 3, 12, 4], Split("start", 2, 0)),
        ([1, 2, 10, 9, 3, 12, 4], Split("answer", 2, 3)),
        ([1, 2, 10, 11, 9, 12, 4], Split("between", 2, 4)),
        ([1, 2, 10, 11, 3, 9, 4], Split("answer", 2, 5)),
    ],
)
def test_a_split_says_why(prompt: list[int], expected: Split | None):
    first, second = choice([10, 11], [1, 2]), choice([12], [1, 2, 10, 11, 3])
    third = choice([13], prompt or [1, 2, 10, 11, 3, 12, 4])
    samples = trajectory_samples(trajectory(0.0, first, second, third))
    assert [sample.split for sample in samples] == [None] + [expected] * (expected is not None)
    assert split_counts(samples) == ({expected.reason: 1} if expected else {})
    again = trajectory_samples(trajectory(0.0, second, first, choice([7], [8])))
    assert [sample.split for sample in again] == [
        None,
        Split("shorter", 1, 2),
        Split("start", 2, 0),
    ]


def in_histories(*histories: list[Choice]) -> art.Trajectory:
    """A trajectory of several histories."""
    own = trajectory(0.0, *histories[0])
    own.additional_histories = [History(messages_and_choices=[*turns]) for turns in histories[1:]]
    return own


def test_all_histories_of_a_trajectory_are_its_samples() -> None:
    first, second = choice([10], [1, 2]), choice([11], [1, 2, 10, 3])
    other, branch = choice([20], [5], [-0.5]), choice([30], [1, 2, 10, 4])
    samples = trajectory_samples(
        in_histories([first, second], [other], [branch]), trajectory_id=3, advantage=0.5
    )
    assert [s.tokens.tolist() for s in samples] == [
        *([1, 2, 10, 3, 11], [5, 20], [1, 2, 10, 4, 30])
    ]
    assert [s.turn_ids.max() for s in samples] == [1, 2, 3]
    assert [s.split and s.split.reason for s in samples] == [None, "history", "history"]
    assert {(s.trajectory_id, s.advantage) for s in samples} == {(3, 0.5)}
    assert (unit_count(samples, "trajectory"), unit_count(samples, "turn")) == (1, 4)


def test_a_choice_of_an_additional_history_is_named() -> None:
    bad = choice([20], [5], [0.5])
    with pytest.raises(MissingLogprobsError, match="additional history 0, choice 0"):
        trajectory_samples(in_histories([choice([1])], [bad]))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("unit", ["trajectory", "turn"])
@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_the_loss_does_not_depend_on_how_turns_are_dealt_to_histories(
    level: str, unit: str, seed: int
) -> None:
    """One history, or the same turns in several: the loss is that of the definition."""
    rng = np.random.default_rng(seed)
    whole, split = [], []
    for _ in range(2):
        turns, tokens = [], [1]
        for _ in range(rng.integers(2, 5)):
            if rng.random() < 0.3:
                tokens = [int(rng.integers(90))]  # a prompt that extends nothing
            said = rng.integers(90, size=rng.integers(1, 5)).tolist()
            turns.append(choice(said, tokens, (-rng.random(len(said))).tolist()))
            tokens = [*tokens, *said, int(rng.integers(90))]
        cut = int(rng.integers(1, len(turns)))
        whole.append(in_histories(turns))
        split.append(in_histories(turns[:cut], turns[cut:]))
    d = rng.normal(0, 0.3, 90)  # the log-ratio of each token: a table stands for the model
    loss = defined_loss(whole, d, level, unit)
    for trajectories in (whole, split):
        assert sampled_loss(trajectories, d, level, unit) == pytest.approx(loss, abs=1e-6)


ADVANTAGES, LOW, HIGH = (1.5, -0.7), 0.1, 0.2


def clipped(s: float, advantage: float) -> float:
    return min(s * advantage, min(max(s, 1 - LOW), 1 + HIGH) * advantage)


def defined_loss(trajectories: list[art.Trajectory], d: Any, level: str, unit: str) -> float:
    """From the formulas: over the choices, without samples."""
    values = []
    for own, advantage in zip(trajectories, ADVANTAGES, strict=True):
        choices: Any = [c for history in own.histories() for c in history.choices()]
        turns = [[d[token] for token in c.token_ids] for c in choices]
        for sequence in [list(itertools.chain(*turns))] if unit == "trajectory" else turns:
            ratios = [np.exp(np.mean(sequence))] if level == "sequence" else np.exp(sequence)
            values.append(np.mean([clipped(s, advantage) for s in ratios]))
    return -float(np.mean(values))


def sampled_loss(trajectories: list[art.Trajectory], d: Any, level: Any, unit: Any) -> float:
    """As training computes it, in as many microbatches as there are trajectories."""
    samples = [
        trajectory_samples(trajectory, trajectory_id=i, advantage=advantage)
        for i, (trajectory, advantage) in enumerate(zip(trajectories, ADVANTAGES, strict=True))
    ]
    total = sum(unit_count(own, unit) for own in samples)
    loss = 0.0
    for batch in pack(flat(samples), 1, unit):
        old = batch.old_logprobs.double()
        new = old + torch.from_numpy(d)[batch.tokens[0, batch.targets]]
        loss += policy_loss(
            *(new, old, batch.sequence_ids, batch.advantages.double()),
            Objective(level, LOW, HIGH),
            total_sequences=total,
        ).loss.item()
    return loss
