"""Sharing prompts: each sample is still there, and as few tokens as the rule says."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.prefixes import branching_groups, small_sample
from gspo.data import shared_prompts
from gspo.data.packing import Microbatch, pack
from gspo.data.sample import Sample
from gspo.data.shared_prompts import GRAIN, SharedPrompts
from gspo.train.minibatches import prepare


def samples_of(seed: int = 0, **shape: int) -> list[Sample]:
    batch = prepare(branching_groups(seed=seed, **shape), context=512)
    return [sample for own in batch.samples for sample in own]


@st.composite
def coincidences(draw: st.DrawFn) -> list[Sample]:
    """Samples over two tokens, so that prefixes coincide all the time; prompts of any length."""
    count = draw(st.integers(1, 14))
    stems = draw(st.lists(st.lists(st.integers(0, 1), max_size=40), min_size=1, max_size=3))
    out = []
    for number in range(count):
        stem = draw(st.sampled_from(stems))
        cut = draw(st.integers(0, len(stem)))
        tokens = [5, *stem[:cut], *draw(st.lists(st.integers(0, 1), min_size=1, max_size=5))]
        prompt = draw(st.integers(1, len(tokens) - 1))
        group = draw(st.integers(0, 2))
        out.append(small_sample(tokens, prompt, number, group))
    return out


def paths(microbatch: Microbatch) -> list[np.ndarray]:
    return np.split(microbatch.index.numpy(), np.cumsum(microbatch.lengths)[:-1])


def in_common(one: Sequence[int], two: Sequence[int]) -> int:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False))
    return len(list(pairs))


def worth(sample: Sample, common: int) -> int:
    """The rule, once more: a multiple of GRAIN, the start of a completion, or all of it."""
    mask = sample.ratio_mask
    starts = [i for i in range(1, len(sample)) if mask[i] and not mask[i - 1]]
    allowed = [*range(0, len(sample) + 1, GRAIN), *starts, len(sample)]
    return max(place for place in allowed if place <= common)


@given(samples=coincidences())
def test_a_layout_holds_every_sample_and_is_as_short_as_the_rule_says(samples: list[Sample]):
    index, shared = SharedPrompts(samples).layout(range(len(samples)))
    ends = np.cumsum([len(sample) for sample in samples])
    placed = np.full(ends[-1] - sum(shared), -1)
    for sample, path in zip(samples, np.split(index, ends[:-1]), strict=True):
        assert (np.diff(path) > 0).all()
        assert ((placed[path] == -1) | (placed[path] == sample.tokens)).all()
        placed[path] = sample.tokens
    assert (placed >= 0).all()
    size, before = 0, []
    for sample in sorted(samples, key=lambda s: s.tokens.tolist()):
        tokens = sample.tokens.tolist()
        common = max((in_common(tokens, other) for other in before), default=0)
        size += len(tokens) - worth(sample, common)
        before.append(tokens)
    assert len(placed) == size


@given(samples=coincidences())
def test_without_a_grain_each_distinct_start_is_there_once(samples: list[Sample]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prompts, "GRAIN", 1)
        index, _ = SharedPrompts(samples).layout(range(len(samples)))
    distinct = {tuple(s.tokens[: n + 1].tolist()) for s in samples for n in range(len(s))}
    assert index.max() + 1 == len(distinct)


@given(samples=coincidences(), data=st.data())
def test_part_of_the_samples_is_laid_out_as_if_they_were_alone(samples, data: st.DataObject):
    numbers = st.sampled_from(range(len(samples)))
    chosen = sorted(data.draw(st.lists(numbers, unique=True, min_size=1)))
    alone = SharedPrompts([samples[i] for i in chosen])
    index, shared = SharedPrompts(samples).layout(chosen)
    index_alone, shared_alone = alone.layout(range(len(chosen)))
    assert index.tolist() == index_alone.tolist()
    assert shared == shared_alone


@given(samples=coincidences())
def test_growing_never_counts_too_few(samples: list[Sample]):
    prompts, ranks = SharedPrompts(samples), []
    index, _ = prompts.layout(range(len(samples)))
    size = index.max() + 1
    assert sum(prompts.grow(ranks, [i]) for i in range(len(samples))) >= size
    assert ranks == sorted(range(len(samples)))
    order = sorted(range(len(samples)), key=prompts.rank.__getitem__)
    assert prompts.grow([], order) == size


@given(samples=coincidences(), budget=st.integers(1, 120))
def test_microbatches_keep_to_the_budget_and_groups_together_where_they_fit(
    samples: list[Sample], budget: int
):
    microbatches = pack(samples, budget, share=True)
    ids = [i for microbatch in microbatches for i in microbatch.trajectory_ids]
    assert sorted(ids) == list(range(len(samples)))
    for microbatch in microbatches:
        assert microbatch.token_count <= budget or len(microbatch.trajectory_ids) == 1
    for group in {s.group_id for s in samples}:
        own = [s for s in samples if s.group_id == group]
        index, _ = SharedPrompts(own).layout(range(len(own)))
        if index.max() < budget:
            numbers = {s.trajectory_id for s in own}
            assert (
                sum(bool(numbers & set(microbatch.trajectory_ids)) for microbatch in microbatches)
                == 1
            )


@pytest.mark.parametrize("budget", [1, 60, 150, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_every_sampled_token_is_there_once_and_reads_its_predecessor(budget: int, seed: int):
    samples = samples_of(seed)
    by_id: dict[int, list[Sample]] = {}
    for sample in samples:
        by_id.setdefault(sample.trajectory_id, []).append(sample)
    seen = []
    for microbatch in pack(samples, budget, share=True):
        at, of_sample = 0, list(paths(microbatch))
        for sequence, trajectory in enumerate(microbatch.trajectory_ids):
            seen.append(trajectory)
            for sample in by_id[trajectory]:
                path = of_sample.pop(0)
                assert microbatch.tokens[0, path].tolist() == sample.tokens.tolist()
                assert microbatch.positions[0, path].tolist() == list(range(len(sample)))
                end = at + sample.sampled
                places = np.flatnonzero(sample.ratio_mask)
                assert microbatch.targets[at:end].tolist() == path[places].tolist()
                assert microbatch.sources[at:end].tolist() == path[places - 1].tolist()
                assert set(microbatch.sequence_ids[at:end].tolist()) == {sequence}
                own = sample.ratio_mask
                assert microbatch.old_logprobs[at:end].tolist() == sample.old_logprobs[own].tolist()
                at = end
        assert at == len(microbatch.targets)
        assert int(microbatch.copies.sum()) == microbatch.sample_tokens == sum(microbatch.lengths)
        assert microbatch.copies.min() >= 1
    assert sorted(seen) == sorted(by_id)


def test_a_group_is_its_prompt_and_its_completions():
    prompt = list(range(10, 30))
    samples = [small_sample([*prompt, 40 + i, 50 + i, 60], 20, i) for i in range(5)]
    (microbatch,) = pack(samples, 100, share=True)
    assert microbatch.token_count == 20 + 5 * 3
    assert sorted(microbatch.shared) == [0, 20, 20, 20, 20]
    assert microbatch.sources[::3].tolist() == [microbatch.index[19]] * 5
    assert microbatch.copies.sort().values.tolist() == [1] * 15 + [5] * 20


def test_short_coincidences_are_left_alone():
    unrelated = [small_sample([1, 2, 3, 10 + i, 20], 4, i, i) for i in range(6)]
    (microbatch,) = pack(unrelated, 100, share=True)
    assert microbatch.token_count == microbatch.sample_tokens
    same_start = [small_sample([*range(9), 30, 31, 40 + i], 9, i) for i in range(4)]
    (microbatch,) = pack(same_start, 100, share=True)
    assert microbatch.shared.count(9) == 3  # the prompt, not the two sampled tokens


def test_groups_share_their_system_prompt_in_whole_grains():
    system = list(range(100, 100 + GRAIN + 3))
    samples = [small_sample([*system, g, 7, i], len(system) + 2, 2 * g + i, g)
               for g in range(2) for i in range(2)]  # fmt: skip
    (microbatch,) = pack(samples, 1000, share=True)
    assert sorted(microbatch.shared) == [0, GRAIN, len(system) + 2, len(system) + 2]


def test_equal_samples_add_nothing():
    samples = [small_sample([1, 2, 3, 4], 2, i) for i in range(3)]
    (microbatch,) = pack(samples, 100, share=True)
    assert microbatch.token_count == 4
    assert microbatch.targets.tolist() == [2, 3] * 3
    assert microbatch.sources.tolist() == [1, 2] * 3
    assert microbatch.sequence_ids.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_group_beyond_the_budget_repeats_its_prompt_in_few_microbatches():
    prompt = list(range(10, 50))
    samples = [small_sample([*prompt, *range(60 + i, 70 + i)], 40, i) for i in range(9)]
    microbatches = pack(samples, 75, share=True)  # the prompt and three completions
    assert sorted(microbatch.token_count for microbatch in microbatches) == [70, 70, 70]


def with_experts(sample: Sample, change_at: int | None = None) -> Sample:
    experts = np.tile(sample.tokens[:-1, None, None] % 4, (1, 2, 2)).astype(np.uint8)
    if change_at is not None:
        experts[change_at] = 5
    return dataclasses.replace(sample, expert_choices=experts)


def test_tokens_with_other_experts_are_not_shared_if_they_are_replayed():
    prompt = list(range(10, 50))
    plain = [small_sample([*prompt, 60 + i, 70], 40, i) for i in range(4)]
    changed_at = (None, None, 35, 0)
    samples = [with_experts(s, place) for s, place in zip(plain, changed_at, strict=True)]
    (microbatch,) = pack(samples, 1000, share=True, replay=True)
    assert sorted(microbatch.shared) == [0, 0, 32, 40]
    replayed = microbatch.replayed_choices()
    assert replayed.shape == (microbatch.token_count, 2, 2)
    for sample, path in zip(samples, paths(microbatch), strict=True):
        assert sample.expert_choices is not None
        assert torch.equal(replayed[path][:-1], torch.from_numpy(sample.expert_choices).short())
        assert (replayed[path[-1]] == -1).all()
    (microbatch,) = pack(samples, 1000, share=True)
    assert sorted(microbatch.shared) == [0, 40, 40, 40]
    with pytest.raises(ValueError, match="replay=True"):
        microbatch.replayed_choices()
    assert microbatch.expert_choices is not None
    assert len(microbatch.expert_choices) == microbatch.sample_tokens


def test_expert_choices_follow_their_tokens_where_nothing_is_shared():
    """The samples lie in the order of their tokens, not in that in which they are given."""
    samples = [with_experts(small_sample([token, 1, 2, 3], 2, i)) for i, token in enumerate((9, 4))]
    (microbatch,) = pack(samples, 1000, share=True, replay=True)
    assert microbatch.shared == (0, 0) and microbatch.tokens[0, 0] == 4
    replayed = microbatch.replayed_choices()
    for sample, path in zip(samples, paths(microbatch), strict=True):
        assert sample.expert_choices is not None
        assert torch.equal(replayed[path][:-1], torch.from_numpy(sample.expert_choices).short())


def test_without_replay_all_expert_choices_are_kept_for_comparison():
    samples = [with_experts(small_sample([1, 2, 3, 4 + i], 3, i)) for i in range(3)]
    (microbatch,) = pack(samples, 1000, share=True)
    (apart,) = pack(samples, 1000)
    assert microbatch.expert_choices is not None
    assert apart.expert_choices is not None
    assert torch.equal(microbatch.expert_choices, apart.expert_choices)
    assert microbatch.token_count < apart.token_count


@given(samples=coincidences(), budget=st.integers(1, 120))
def test_packing_is_deterministic(samples: list[Sample], budget: int):
    pairs = zip(pack(samples, budget, share=True), pack(samples, budget, share=True), strict=True)
    for one, two in pairs:
        assert one.trajectory_ids == two.trajectory_ids
        assert torch.equal(one.index, two.index)
        assert torch.equal(one.tokens, two.tokens)
