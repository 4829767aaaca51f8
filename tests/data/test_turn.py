"""What training reads of a Choice: each field that means nothing is named, with its value."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gspo.core.errors import DataError, MissingLogprobsError
from gspo.data.sample import trajectory_samples
from gspo.data.turn import read_fields, read_turn
from support import choice, trajectory


def changed(**fields: Any) -> Any:
    """A Choice of two tokens, with fields set after it was made, as nothing checks them then."""
    made = choice([4, 5])
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_numbers_of_numpy_count():
    turn = read_turn(
        changed(
            token_ids=np.array([4, 5]),
            prompt_token_ids=(np.int64(1),),
            token_logprobs=np.array([-1.0, -2.0], np.float32),
            temperature=np.float32(0.5),
            policy_version=np.int32(3),
        ),
        "c",
    )
    assert (turn.tokens, turn.prompt, turn.logprobs) == ([4, 5], [1], [-1.0, -2.0])
    assert (turn.temperature, turn.policy_version) == (0.5, 3)
    assert all(type(token) is int for token in (*turn.tokens, *turn.prompt))


def test_what_is_missing_is_empty():
    fields = read_fields(
        changed(token_ids=None, token_logprobs=None, temperature=None, policy_version=None), "c"
    )
    assert (fields.tokens, fields.logprobs) == ([], [])
    assert (fields.temperature, fields.policy_version) == (1.0, -1)


@pytest.mark.parametrize("name", ["token_ids", "prompt_token_ids"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([True, False], r"\[0\] is True \(bool\); token ids are a list of whole numbers"),
        ([1, 1.5], r"\[1\] is 1.5 \(float\)"),
        ([1, None], r"\[1\] is None"),
        (["a", "b"], r"\[0\] is 'a'"),
        ([1, -1], r"\[1\] is -1"),
        ([10**30], r"\[0\] is 1000"),
        ("ab", "is 'ab' .* a list"),
        (5, r"is 5 .* a list"),
        ([[1]], r"\[0\] is \[1\]"),
    ],
)
def test_token_ids_are_whole_numbers(name: str, value: Any, message: str):
    with pytest.raises(DataError, match=f"group 0: {name}.*{message}"):
        read_fields(changed(**{name: value}), "group 0")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([None, -1.0], r"token_logprobs\[0\] is None"),
        ([-1.0, "a"], r"token_logprobs\[1\] is 'a'"),
        ([-1.0, math.nan], r"token_logprobs\[1\] is nan"),
        ([-math.inf, -1.0], r"token_logprobs\[0\] is -inf"),
        ([-1.0, 0.1], r"token_logprobs\[1\] is 0.1"),
        ([False, -1.0], r"token_logprobs\[0\] is False"),
        ("ab", "is 'ab' .* a list"),
        (5, "is 5 .* a list"),
        (np.full(2, -1.0, np.float16), "float16"),
        ([np.float16(-1.0), -1.0], "float16"),
    ],
)
def test_log_probs_are_finite_numbers_up_to_0(value: Any, message: str):
    with pytest.raises(MissingLogprobsError, match=message):
        read_fields(changed(token_logprobs=value), "c")


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, 1e-300, "x", True, [1.0], 10**400])
def test_a_temperature_that_means_nothing(value: Any):
    with pytest.raises(DataError, match=r"c: temperature is .*must be the number"):
        read_fields(changed(temperature=value), "c")


@pytest.mark.parametrize("value", [-5, 1.5, "x", True, math.nan, 1e300, 10**30])
def test_a_policy_version_that_means_nothing(value: Any):
    with pytest.raises(DataError, match=r"c: policy_version is .*whole number"):
        read_fields(changed(policy_version=value), "c")


def test_a_version_for_each_token():
    assert read_turn(changed(policy_versions=[3, np.int64(4)]), "c").policy_versions == (3, 4)
    assert read_turn(changed(policy_versions=None), "c").policy_versions == ()


@pytest.mark.parametrize("value", [[1], [1, -1], [1, 2.0], "ab", [1, 2, 3], [True, 1]])
def test_versions_of_tokens_that_mean_nothing(value: Any):
    with pytest.raises(DataError, match=r"c: policy_versions.* is .*must be"):
        read_fields(changed(policy_versions=value), "c")


@pytest.mark.parametrize(
    "value", [5, "x", {"a": 1}, {"shape": [10**30], "dtype": "uint8", "data": ""}]
)
def test_expert_choices_that_mean_nothing(value: Any):
    with pytest.raises(DataError, match="c: routed_experts is damaged"):
        read_turn(changed(routed_experts=value), "c")


def test_openais_log_probs_of_a_wrong_kind():
    odd = changed(token_logprobs=None, logprobs=5)
    assert read_fields(odd, "c").logprobs == []
    with pytest.raises(MissingLogprobsError, match="no log-probs"):
        read_turn(odd, "c")


def test_a_token_id_beyond_the_vocabulary_is_named():
    good = trajectory_samples(trajectory(0.0, choice([98, 99])), vocabulary=100)
    assert len(good) == 1
    with pytest.raises(DataError, match=r"here holds token id 100, .* vocabulary has 100 entries"):
        trajectory_samples(trajectory(0.0, choice([4, 100])), vocabulary=100, where="here")


@pytest.mark.parametrize("value", ["top_p", [1], [""], [None], 5, ["x" * 65]])
def test_names_of_what_altered_the_draw(value: Any):
    assert read_fields(changed(altered_by=["top_p", "grammar"]), "c").altered_by == (
        "top_p",
        "grammar",
    )
    assert read_fields(changed(altered_by=None), "c").altered_by == ()
    with pytest.raises(DataError, match=r"c: altered_by.*names of sampling parameters"):
        read_fields(changed(altered_by=value), "c")
