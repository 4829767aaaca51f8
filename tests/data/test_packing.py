"""Packing moves tokens and changes nothing."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gspo.data.packing import Microbatch, pack
from gspo.data.sample import Sample

BUDGETS = st.integers(1, 60)


def make_sample(trajectory_id: int, length: int, rng: np.random.Generator) -> Sample:
    """A sample whose every value is its own, and whose last token at least was sampled."""
    mask = rng.random(length) < 0.5
    mask[0], mask[-1] = False, True
    return Sample(
        tokens=rng.integers(0, 2**40, length),
        ratio_mask=mask,
        old_logprobs=np.where(mask, -rng.random(length), 0).astype(np.float32),
        sampling_logprobs=np.where(mask, -rng.random(length), 0).astype(np.float32),
        temperatures=np.where(mask, rng.random(length) + 0.5, 1).astype(np.float32),
        turn_ids=np.where(mask, 0, -1),
        policy_versions=np.where(mask, 0, -1),
        trajectory_id=trajectory_id,
        group_id=trajectory_id // 2,
        advantage=trajectory_id / 8 - 1,
    )


@st.composite
def sample_lists(draw: st.DrawFn) -> list[Sample]:
    """Samples of trajectories with one to three samples each, in any order, ids with gaps."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    counts = draw(st.dictionaries(st.integers(0, 99), st.integers(1, 3), max_size=12))
    owners = [owner for owner, count in counts.items() for _ in range(count)]
    return [make_sample(o, int(rng.integers(2, 30)), rng) for o in draw(st.permutations(owners))]


def spans(microbatch: Microbatch) -> list[tuple[int, int]]:
    """(start, end) of each sample in the microbatch."""
    ends = list(itertools.accumulate(microbatch.lengths))
    return list(zip([0, *ends[:-1]], ends, strict=True))


@given(samples=sample_lists(), budget=BUDGETS)
def test_every_sample_appears_once_and_as_it_was(samples: list[Sample], budget: int) -> None:
    left = {tuple(sample.tokens): sample for sample in samples}
    for microbatch in pack(samples, budget):
        assert microbatch.token_count == sum(microbatch.lengths) == microbatch.tokens.shape[1]
        used = 0
        for start, end in spans(microbatch):
            sample = left.pop(tuple(microbatch.tokens[0, start:end].tolist()))
            assert microbatch.positions[0, start:end].tolist() == list(range(end - start))
            inside = (microbatch.targets >= start) & (microbatch.targets < end)
            used += int(inside.sum())
            own = sample.ratio_mask
            assert (microbatch.targets[inside] - start).tolist() == np.flatnonzero(own).tolist()
            assert microbatch.old_logprobs[inside].tolist() == sample.old_logprobs[own].tolist()
            sampling = sample.sampling_logprobs[own].tolist()
            assert microbatch.sampling_logprobs[inside].tolist() == sampling
            assert microbatch.temperatures[inside].tolist() == sample.temperatures[own].tolist()
            (sequence,) = microbatch.sequence_ids[inside].unique().tolist()
            assert microbatch.trajectory_ids[sequence] == sample.trajectory_id
            assert microbatch.advantages[sequence].item() == sample.advantage
        assert used == microbatch.targets.numel()
    assert not left


@given(samples=sample_lists(), budget=BUDGETS)
def test_no_trajectory_is_torn_and_microbatches_keep_to_the_budget(
    samples: list[Sample], budget: int
) -> None:
    microbatches = pack(samples, budget)
    ids = [i for microbatch in microbatches for i in microbatch.trajectory_ids]
    assert len(ids) == len(set(ids))
    assert set(ids) == {sample.trajectory_id for sample in samples}
    for microbatch in microbatches:
        assert microbatch.token_count <= budget or len(microbatch.trajectory_ids) == 1
        assert set(microbatch.sequence_ids.tolist()) == set(range(len(microbatch.trajectory_ids)))


@given(samples=sample_lists(), budget=BUDGETS, seed=st.integers(0, 2**16))
@pytest.mark.parametrize("share", [False, True])
def test_a_turn_is_a_sequence_of_its_own_trajectory(
    samples: list[Sample], budget: int, share: bool, seed: int
) -> None:
    """Turns of two trajectories have the same numbers, and stay apart. A turn goes on in the next
    sample of its trajectory under its number. Log-probs tell the tokens apart."""
    rng = np.random.default_rng(seed)
    turned, expected, count = [], {}, 0
    for sample in samples:
        turns = np.where(sample.ratio_mask, np.sort(rng.integers(0, 4, len(sample))), -1)
        old = -np.arange(count + 1, count + len(sample) + 1) / 4096
        count += len(sample)
        changed = {"turn_ids": turns, "old_logprobs": old.astype(np.float32)}
        turned.append(dataclasses.replace(sample, **changed))
        for t in np.flatnonzero(sample.ratio_mask):
            expected[old[t]] = (sample.trajectory_id, int(turns[t]), sample.advantage)
    numbers: dict[tuple[int, int, float], set[tuple[int, int]]] = {}
    for r, microbatch in enumerate(pack(turned, budget, "turn", share=share)):
        assert len(microbatch.trajectory_ids) == len(microbatch.advantages)
        for key, s in zip(
            microbatch.old_logprobs.tolist(), microbatch.sequence_ids.tolist(), strict=True
        ):
            trajectory, turn, advantage = expected.pop(key)
            numbers.setdefault((trajectory, turn, advantage), set()).add((r, s))
            assert microbatch.trajectory_ids[s] == trajectory
            assert microbatch.advantages[s].item() == advantage
    assert not expected
    assert all(len(found) == 1 for found in numbers.values())  # a turn is one sequence
    assert len(set.union(set(), *numbers.values())) == len(numbers)  # and no two turns are


@given(samples=sample_lists(), budget=BUDGETS)
def test_packing_is_deterministic(samples: list[Sample], budget: int) -> None:
    for one, two in zip(pack(samples, budget), pack(samples, budget), strict=True):
        assert one.trajectory_ids == two.trajectory_ids
        assert one.lengths == two.lengths
        assert torch.equal(one.tokens, two.tokens)
        assert torch.equal(one.old_logprobs, two.old_logprobs)


def test_types_and_shapes() -> None:
    (microbatch,) = pack([make_sample(4, 6, np.random.default_rng(0))], 100)
    assert microbatch.tokens.shape == microbatch.positions.shape == (1, 6)
    for name in ("tokens", "positions", "targets", "sequence_ids"):
        assert getattr(microbatch, name).dtype == torch.int64
    for name in ("old_logprobs", "temperatures", "advantages"):
        assert getattr(microbatch, name).dtype == torch.float32
    assert microbatch.advantages.tolist() == [-0.5]


def test_nothing_packs_into_nothing() -> None:
    assert pack([], 10) == []


def test_packing_does_not_share_memory_with_the_samples() -> None:
    sample = make_sample(0, 5, np.random.default_rng(0))
    (microbatch,) = pack([sample], 10)
    before = sample.tokens.copy()
    microbatch.tokens.zero_()
    assert (sample.tokens == before).all()
