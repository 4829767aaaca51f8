"""Sharing prefixes: every sample is still there, and the row is as short as the rule says."""

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
from gspo.data import shared_prompts as prefix
from gspo.data.packing import Microbatch, pack
from gspo.data.sample import Sample
from gspo.data.shared_prompts import GRAIN, Prefixes
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
    layout = Prefixes(samples).layout(range(len(samples)))
    row = np.full(layout.size, -1)
    for sample, path in zip(
        samples, np.split(layout.index, np.cumsum([len(s) for s in samples])[:-1]), strict=True
    ):
        assert (np.diff(path) > 0).all()
        assert ((row[path] == -1) | (row[path] == sample.tokens)).all()
        row[path] = sample.tokens
    assert (row >= 0).all()
    size, before = 0, []
    for sample in sorted(samples, key=lambda s: s.tokens.tolist()):
        tokens = sample.tokens.tolist()
        common = max((in_common(tokens, other) for other in before), default=0)
        size += len(tokens) - worth(sample, common)
        before.append(tokens)
    assert layout.size == size


@given(samples=coincidences())
def test_without_a_grain_a_row_holds_each_distinct_prefix_once(samples: list[Sample]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "GRAIN", 1)
        layout = Prefixes(samples).layout(range(len(samples)))
    distinct = {tuple(s.tokens[: n + 1].tolist()) for s in samples for n in range(len(s))}
    assert layout.size == len(distinct)


@given(samples=coincidences(), data=st.data())
def test_part_of_the_samples_is_laid_out_as_if_they_were_alone(samples, data: st.DataObject):
    numbers = st.sampled_from(range(len(samples)))
    chosen = sorted(data.draw(st.lists(numbers, unique=True, min_size=1)))
    whole, alone = Prefixes(samples), Prefixes([samples[i] for i in chosen])
    one, two = whole.layout(chosen), alone.layout(range(len(chosen)))
    assert one.size == two.size
    assert one.index.tolist() == two.index.tolist()
    assert one.shared == two.shared


@given(samples=coincidences())
def test_growing_never_counts_too_few(samples: list[Sample]):
    prefixes, ranks = Prefixes(samples), []
    grown = sum(prefixes.grow(ranks, [i]) for i in range(len(samples)))
    assert grown >= prefixes.layout(range(len(samples))).size
    assert ranks == sorted(range(len(samples)))
    order = sorted(range(len(samples)), key=lambda i: prefixes.rank[i])
    ranks = []
    exact = sum(prefixes.grow(ranks, [i]) for i in order)
    assert exact == prefixes.layout(range(len(samples))).size


@given(samples=coincidences(), budget=st.integers(1, 120))
def test_rows_keep_to_the_budget_and_groups_together_where_they_fit(
    samples: list[Sample], budget: int
):
    microbatches = pack(samples, budget, share=True)
    ids = [i for microbatch in microbatches for i in microbatch.trajectory_ids]
    assert sorted(ids) == list(range(len(samples)))
    for microbatch in microbatches:
        assert microbatch.token_count <= budget or len(microbatch.trajectory_ids) == 1
    for group in {s.group_id for s in samples}:
        own = [s for s in samples if s.group_id == group]
        if Prefixes(own).layout(range(len(own))).size <= budget:
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
        at, of_row = 0, list(paths(microbatch))
        for sequence, trajectory in enumerate(microbatch.trajectory_ids):
            seen.append(trajectory)
            for sample in by_id[trajectory]:
                path = of_row.pop(0)
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


def test_a_group_beyond_the_budget_repeats_its_prompt_in_few_rows():
    prompt = list(range(10, 50))
    samples = [small_sample([*prompt, *range(60 + i, 70 + i)], 40, i) for i in range(9)]
    microbatches = pack(samples, 75, share=True)  # the prompt and three completions
    assert sorted(microbatch.token_count for microbatch in microbatches) == [70, 70, 70]


def routed(sample: Sample, change_at: int | None = None) -> Sample:
    routes = np.tile(sample.tokens[:-1, None, None] % 4, (1, 2, 2)).astype(np.uint8)
    if change_at is not None:
        routes[change_at] = 5
    return dataclasses.replace(sample, routes=routes)


def test_tokens_with_other_routes_are_not_shared_where_routes_are_replayed():
    prompt = list(range(10, 50))
    plain = [small_sample([*prompt, 60 + i, 70], 40, i) for i in range(4)]
    samples = [routed(plain[0]), routed(plain[1]), routed(plain[2], 35), routed(plain[3], 0)]
    (microbatch,) = pack(samples, 1000, share=True, routed=True)
    assert sorted(microbatch.shared) == [0, 0, 32, 40]
    routes = microbatch.replayed_choices()
    assert routes is not None
    assert routes.shape == (microbatch.token_count, 2, 2)
    for sample, path in zip(samples, paths(microbatch), strict=True):
        assert sample.expert_choices is not None
        assert torch.equal(routes[path][:-1], torch.from_numpy(sample.expert_choices).short())
        assert (routes[path[-1]] == -1).all()
    (microbatch,) = pack(samples, 1000, share=True)
    assert sorted(microbatch.shared) == [0, 40, 40, 40]
    with pytest.raises(ValueError, match="replay=True"):
        microbatch.replayed_choices()
    assert microbatch.expert_choices is not None
    assert len(microbatch.expert_choices) == microbatch.sample_tokens


def test_an_unrouted_row_keeps_all_routes_for_comparison():
    samples = [routed(small_sample([1, 2, 3, 4 + i], 3, i)) for i in range(3)]
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
