from __future__ import annotations

import pytest
import torch

from gspo.serve.sampling import RandomStreams, sample

DEVICE = torch.device("cpu")


def many(logits: torch.Tensor, temperature: float, top_p: float, draws: int = 4000):
    rows = logits.expand(draws, -1)
    uniform = RandomStreams([(0, i) for i in range(draws)], DEVICE).draw()
    return sample(rows, torch.full((draws,), temperature), torch.full((draws,), top_p), uniform)


def test_frequencies_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -30.0]])
    tokens, _ = many(logits, 0.7, 1.0)
    expected = (logits[0] / 0.7).softmax(-1)
    seen = torch.bincount(tokens, minlength=4) / len(tokens)
    assert (seen - expected).abs().max() < 0.03
    assert seen[3] == 0


def test_logprobs_are_at_the_sampling_temperature_and_not_renormalised_by_top_p():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    tokens, logprobs = many(logits, 0.7, 0.5)
    assert set(tokens.tolist()) == {2}
    expected = (logits[0] / 0.7).log_softmax(-1)[2]
    torch.testing.assert_close(logprobs, expected.expand_as(logprobs))


def test_top_p_keeps_the_token_that_crosses_the_threshold():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    tokens, _ = many(logits, 1.0, 0.6)
    assert set(tokens.tolist()) == {0, 1}


def test_greedy_and_sampled_rows_mix():
    logits = torch.tensor([[0.0, 3.0], [0.0, 3.0]])
    tokens, logprobs = sample(
        logits, torch.tensor([0.0, 1.0]), torch.ones(2), torch.tensor([0.0, 0.0])
    )
    assert tokens.tolist() == [1, 0]
    torch.testing.assert_close(logprobs, logits[0].log_softmax(-1)[torch.tensor([1, 0])])


def test_the_largest_number_never_picks_an_impossible_token():
    logits = torch.full((1, 50_000), -torch.inf)
    logits[0, :7] = 0.0
    tokens, logprobs = sample(logits, torch.ones(1), torch.ones(1), torch.tensor([1.0 - 2.0**-23]))
    assert tokens.item() < 7
    assert torch.isfinite(logprobs).all()


def test_a_row_draws_the_same_numbers_in_any_company():
    alone = RandomStreams([(7, 3)], DEVICE)
    company = RandomStreams([(1, 0), (7, 3), (7, 4)], DEVICE)
    for step in range(150):
        one, three = alone.draw(), company.draw()
        assert one[0] == (three[1] if step < 40 else three[0])
        if step == 39:
            company.keep(torch.tensor([1, 2]))


def test_negative_and_large_seeds_have_streams_of_their_own():
    numbers = RandomStreams([(0, 0), (-1, 0), (0, -1), (2**63, 0), (2**63 - 1, 5)], DEVICE).draw()
    assert len(set(numbers.tolist())) == 5


def test_a_barred_token_far_above_the_others_leaves_their_distribution():
    """Powers relative to it would all be 0."""
    logits = torch.tensor([[5.0, 3.0, 1.0, 9.0, 0.0]])
    barred = torch.tensor([[False, False, False, True, False]])
    for top_p in (1.0, 0.9):
        given = (torch.tensor([0.02]), torch.tensor([top_p]), torch.tensor([0.5]), barred)
        token, logprob = sample(logits, *given)
        assert token.tolist() == [0]
        assert logprob.item() == pytest.approx(-200, rel=1e-4)  # of the whole distribution
