"""What is drawn follows the distribution that was asked for, whoever is beside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo.serve.params import SamplingParams
from gspo.serve.philox import RandomStreams
from gspo.serve.sampling import Parts, sample

DEVICE = torch.device("cpu")


def parts_of(temperatures: list[float]) -> Parts:
    """Of completions that sample from all tokens."""
    return Parts([SamplingParams(temperature=t) for t in temperatures], DEVICE)


def many(logits: torch.Tensor, draws: int = 4000, **params):
    each = SamplingParams(**params)
    rows = logits.expand(draws, -1)
    streams = RandomStreams(DEVICE)
    streams.add([(0, i) for i in range(draws)])
    uniform = streams.draw()
    parts = Parts([each] * draws, DEVICE)
    temperature = torch.full((draws,), each.temperature)
    return sample(rows, temperature, uniform, parts)[:2]


def part(logits: torch.Tensor, params: SamplingParams) -> dict[int, float]:
    """The distribution that tokens are drawn from, by plain loops in float64."""
    p = (logits.double() / params.temperature).softmax(-1).tolist()
    left = dict(sorted(enumerate(p), key=lambda pair: -pair[1]))
    if params.top_k:
        left = dict(list(left.items())[: params.top_k])
    most = max(left.values())
    left = {token: value for token, value in left.items() if value >= params.min_p * most}
    total, sum_before, out = sum(left.values()), 0.0, {}
    for token, value in left.items():
        if params.top_p == 1 or sum_before < params.top_p * total:
            out[token] = value
        sum_before += value
    total = sum(out.values())
    return {token: value / total for token, value in out.items()}


def test_frequencies_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -30.0]])
    tokens, _ = many(logits, temperature=0.7)
    expected = (logits[0] / 0.7).softmax(-1)
    seen = torch.bincount(tokens, minlength=4) / len(tokens)
    assert (seen - expected).abs().max() < 0.03
    assert seen[3] == 0


@pytest.mark.parametrize(
    "params",
    [
        {"top_p": 0.6},
        {"top_k": 3},
        {"min_p": 0.2},
        {"top_k": 4, "top_p": 0.8},  # of what top_k left, not of all
        {"top_k": 5, "min_p": 0.3, "top_p": 0.9, "temperature": 2.0},
        {"top_k": 1},
        {"min_p": 1.0},
        {"top_k": 10**6},
    ],
)
def test_frequencies_follow_the_part_that_is_asked_for(params: dict):
    logits = torch.tensor([[0.3, 1.0, 2.0, 1.7, -0.5, 0.8, 1.9, -1.0]])
    tokens, logprobs = many(logits, **params)
    expected = part(logits[0], SamplingParams(**params))
    seen = torch.bincount(tokens, minlength=8) / len(tokens)
    assert set(seen.nonzero().flatten().tolist()) == set(expected)
    for token, share in expected.items():
        assert seen[token].item() == pytest.approx(share, abs=0.03)
    # And the log-probs are those of the whole distribution.
    whole = (logits[0] / SamplingParams(**params).temperature).log_softmax(-1)
    torch.testing.assert_close(logprobs, whole[tokens])


def test_top_p_keeps_the_token_that_crosses_the_threshold():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    tokens, _ = many(logits, top_p=0.6)
    assert set(tokens.tolist()) == {0, 1}


def test_top_k_keeps_all_that_are_as_likely_as_the_last():
    tokens, _ = many(torch.tensor([[2.0, 1.0, 1.0, 0.0]]), top_k=2)
    assert set(tokens.tolist()) == {0, 1, 2}


def test_greedy_and_sampled_rows_mix():
    logits = torch.tensor([[0.0, 3.0], [0.0, 3.0]])
    temperatures = [0.0, 1.0]
    tokens, logprobs, _ = sample(
        logits, torch.tensor(temperatures), torch.zeros(2), parts_of(temperatures)
    )
    assert tokens.tolist() == [1, 0]
    torch.testing.assert_close(logprobs, logits[0].log_softmax(-1)[torch.tensor([1, 0])])


def test_the_largest_number_never_picks_an_impossible_token():
    logits = torch.full((1, 50_000), -torch.inf)
    logits[0, :7] = 0.0
    largest = torch.tensor([1.0 - 2.0**-23])
    tokens, logprobs, _ = sample(logits, torch.ones(1), largest, parts_of([1.0]))
    assert tokens.item() < 7
    assert torch.isfinite(logprobs).all()


KINDS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"top_k": 7},
    {"min_p": 0.05},
    {"top_k": 40, "min_p": 0.01, "top_p": 0.95, "temperature": 1.3},
]


@pytest.mark.parametrize("vocabulary", [103, 5000])
@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, len(KINDS) - 1), min_size=1, max_size=12), st.integers(0, 99))
def test_a_draw_does_not_depend_on_its_neighbours(vocabulary: int, kinds: list[int], seed: int):
    """To the bit: each row alone gives what it gives among others of other kinds."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(kinds), vocabulary, generator=generator) * 3
    new = torch.randn(len(kinds), vocabulary, generator=generator) * 3
    uniform = torch.rand(len(kinds), generator=generator)
    params = [SamplingParams(**KINDS[kind]) for kind in kinds]
    temperature = torch.tensor([p.temperature for p in params])

    def drawn(rows: list[int]) -> list[tuple[int, float]]:
        changed = torch.tensor([i for i, row in enumerate(rows) if row % 3 == 0], dtype=torch.long)
        chosen = torch.tensor(rows)
        tokens, logprobs, _ = sample(
            logits[chosen],
            temperature[chosen],
            uniform[chosen],
            Parts([params[row] for row in rows], DEVICE),
            (changed, new[chosen[changed]]) if len(changed) else None,
        )
        return list(zip(tokens.tolist(), logprobs.tolist(), strict=True))

    together = drawn(list(range(len(kinds))))
    assert together == [drawn([row])[0] for row in range(len(kinds))]


def test_several_log_probs_have_the_bits_of_the_drawn_ones():
    logits = torch.randn(9, 3000, generator=torch.Generator().manual_seed(0)) * 4
    temperature = torch.linspace(0.3, 2.0, 9)
    parts = parts_of(temperature.tolist())
    tokens, logprobs, softmax = sample(logits, temperature, torch.full((9,), 0.5), parts)
    rows = torch.tensor([1, 4, 8])
    same = logits[rows].gather(1, tokens[rows, None])
    assert torch.equal(softmax.logprobs(same, rows).squeeze(1), logprobs[rows])


def test_a_barred_token_far_above_the_others_leaves_their_distribution():
    """Powers relative to it would all be 0."""
    logits = torch.tensor([[5.0, 3.0, 1.0, 9.0, 0.0]])
    changed = torch.tensor([0]), logits.masked_fill(logits == 9, -torch.inf)
    for top_p in (1.0, 0.9):
        parts = Parts([SamplingParams(top_p=top_p)], DEVICE)
        given = (torch.tensor([0.02]), torch.tensor([0.5]), parts, changed)
        token, logprob, _ = sample(logits, *given)
        assert token.tolist() == [0]
        assert logprob.item() == pytest.approx(-200, rel=1e-4)  # of the whole distribution
