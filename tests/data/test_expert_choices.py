"""Expert choices travel with a Choice, are joined over turns, and are packed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gspo.core.errors import DataError
from gspo.data.expert_choices import decode_expert_choices, encode_expert_choices
from gspo.data.packing import pack
from gspo.data.sample import trajectory_samples
from support import choice, trajectory


def experts_of(length: int, fill: int) -> np.ndarray:
    return np.full((length, 2, 2), fill, np.uint8)


def test_a_token_keeps_the_experts_that_it_was_sampled_with():
    """Turn 1: 3 + 2 tokens, choices for the first 4. Turn 2: 7 + 2 tokens, choices for 8."""
    first = choice([4, 5], [1, 2, 3], routed_experts=encode_expert_choices(experts_of(4, 1)))
    second = choice(
        [8, 9], [1, 2, 3, 4, 5, 6, 7], routed_experts=encode_expert_choices(experts_of(8, 2))
    )
    (sample,) = trajectory_samples(trajectory(0.0, first, second))
    assert sample.expert_choices is not None
    assert sample.expert_choices[:, 0, 0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
    bare = choice([4, 5], [1, 2, 3])
    (late,) = trajectory_samples(trajectory(0.0, bare, second))
    assert late.expert_choices is not None
    assert late.expert_choices[:, 0, 0].tolist() == [2] * 8
    (none,) = trajectory_samples(trajectory(0.0, bare))
    assert none.expert_choices is None


def test_packed_choices_are_minus_one_where_none_is_known():
    with_experts = choice(
        [4, 5], [1, 2, 3], routed_experts=encode_expert_choices(experts_of(4, 200))
    )
    samples = [
        *trajectory_samples(trajectory(0.0, choice([4], [1, 2])), trajectory_id=0),
        *trajectory_samples(trajectory(0.0, with_experts), trajectory_id=1),
    ]
    (microbatch,) = pack(samples, 100)
    assert microbatch.expert_choices is not None
    assert microbatch.expert_choices.dtype == torch.int16
    assert microbatch.expert_choices[:, 1, 1].tolist() == [-1, -1, -1, 200, 200, 200, 200, -1]
    (bare,) = pack(samples[:1], 100)
    assert bare.expert_choices is None


@pytest.mark.parametrize("experts", [np.uint8, np.int16])
def test_choices_survive_the_wire(experts: Any):
    chosen = np.arange(24).reshape(4, 3, 2).astype(experts)
    decoded = decode_expert_choices(encode_expert_choices(chosen), 4, "here")
    assert decoded is not None
    assert decoded.dtype == experts
    assert np.array_equal(decoded, chosen)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"data": "AAA"}, "damaged"),
        ({"data": "AAAA"}, "damaged"),
        ({"dtype": "float64"}, "dtype 'float64' is not one of"),
        ({"shape": None}, "damaged"),
        ({"shape": [4, 4]}, r"must be \[4, layers, k\]"),
        ({"shape": [2, 2, 4]}, r"must be \[4, layers, k\]"),
    ],
)
def test_damaged_choices_are_named(damage: dict[str, Any], message: str):
    value = encode_expert_choices(experts_of(4, 1)) | damage
    broken = choice([4, 5], [1, 2, 3], routed_experts=value)
    with pytest.raises(DataError, match=f"trajectory 0, choice 0: routed_experts.*{message}"):
        trajectory_samples(trajectory(0.0, broken))
