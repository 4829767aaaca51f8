"""The benchmarks of single parts at toy sizes, and what they assert before a figure is believed."""

from __future__ import annotations

import doctest
import math
from dataclasses import replace
from pathlib import Path

import exact
import logprob
import packing
import prefix
import pytest
import table
from guard import regressions
from harness import Result

from gspo.data.best_fit import plan_microbatches


def test_doctests() -> None:
    for module in (logprob, packing, table):
        assert doctest.testmod(module).failed == 0


@pytest.mark.slow
def test_logprobs_run_and_say_what_was_extrapolated() -> None:
    frozen, trained = (Result.of(row) for row in logprob.measure(1, tiny=True))
    assert {"logprob", "entropy", "d_hidden"} == set(frozen.detail["gaps"])
    assert "d_weight" in trained.detail["gaps"]
    assert frozen.memory_share is None
    # How much resident memory grows is the allocator's affair: what is made of the figures is
    # tested below, with given ones.
    assert trained.other_mb is not None and trained.other_mb > 0
    large = trained.detail["at_512"]
    assert large["naive"] == "measured" or large["naive"].startswith("extrapolated")
    assert large["naive_mb"] > 0


def test_the_naive_way_is_extrapolated_where_it_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, int]] = []

    def fresh_peak(side: str, case: logprob.Case) -> logprob.Peak:
        asked.append((side, case.tokens))
        return logprob.Peak(10.0 + case.tokens if side == "naive" else 5.0, 0.5)

    monkeypatch.setattr(logprob, "fresh_peak", fresh_peak)
    monkeypatch.setattr(logprob, "available_mb", lambda: 500.0)
    case = logprob.cases(tiny=True)[1]
    peaks, detail = logprob._memory(case, naive_s=2.0)
    assert ("naive", case.large) not in asked
    assert peaks == {"ours_mb": 5.0, "other_mb": 266.0}
    large = detail["at_512"]
    assert (large["naive_mb"], large["naive_s"], large["ours_mb"]) == (522.0, 4.0, 5.0)
    assert large["naive"].startswith("extrapolated linearly")


def test_unequal_logprobs_are_noticed() -> None:
    given = logprob.inputs(logprob.cases(tiny=True)[1])
    good = logprob.ours(given)
    with pytest.raises(AssertionError, match=r"logprob is off by 0\.001"):
        logprob.check(good._replace(logprobs=good.logprobs + 1e-3), good)
    with pytest.raises(AssertionError, match="d_weight is off"):
        logprob.check(good._replace(gradients=(good[2][0], 1.01 * good[2][1])), good)
    with pytest.raises(AssertionError, match="one side gave fewer gradients"):
        logprob.check(good._replace(gradients=good.gradients[:1]), good)


def test_full_sizes_are_those_that_the_page_names() -> None:
    by_what = {case.what: case for case in logprob.cases()}
    assert by_what["frozen head"].large == by_what["trained head"].large == 8192
    assert by_what["trained head"].vocabulary == 262_144
    first = prefix.cases()[0]
    assert (first.prompt, first.answer, first.size, first.goal) == (1024, 64, 16, 8)


def test_shared_prefixes_run() -> None:
    rows = [Result.of(row) for row in prefix.measure(1, tiny=True)]
    # 3 completions of 4 tokens behind a prompt of 24, twice.
    assert rows[0].detail["computed_tokens"] == {"ours": 2 * (24 + 12), "other": 2 * 3 * 28}
    assert rows[0].detail["trained_tokens"] == 24
    # Each of 3 turns is a sample: histories of 8, 13 and 18 tokens, and 5 that were sampled.
    assert rows[1].detail["computed_tokens"]["other"] == 2 * 2 * (8 + 13 + 18 + 3 * 5)
    assert rows[1].detail["tokens_ratio"] > 1


def test_exact_mode_is_measured_beside_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Result.of(row) for row in exact.measure(1, tiny=True)]
    assert [row.what.split(": ")[1] for row in rows] == ["whole", "rollouts", "training"]
    assert rows[0].ours_s > rows[1].ours_s > 0
    loop = exact.Side.loop
    monkeypatch.setattr(exact.Side, "loop", lambda self: (loop(self)[0], 1e-7))
    with pytest.raises(AssertionError, match="log-probs differ by 1e-07 with exact=True"):
        exact.measure(1, tiny=True)


def test_unequal_training_is_noticed(tmp_path: Path) -> None:
    case = prefix.cases(tiny=True)[0]
    trainer = prefix.Trainer(prefix.load_policy("embedded:sort"))
    batch = prefix.make_batch(case, trainer.policy)
    good = prefix.observed(trainer, batch, prefix.settings(share=False))
    other = {name: 1.01 * own for name, own in good.gradient.items()}
    for changed, message in (
        (replace(good, metrics=good.metrics | {"tokens/trained": 23.0}), "trained on 23 and 24"),
        (replace(good, metrics=good.metrics | {"loss/policy": 1.0}), "the losses differ by"),
        (replace(good, gradient=other), "the gradients differ by"),
        (replace(good, gradient={}), "gradients of different parameters"),
    ):
        with pytest.raises(AssertionError, match=message):
            prefix.check(changed, good)


def test_packing_runs_and_reaches_its_goal_on_the_stored_lengths() -> None:
    efficiency, padding, planning = (Result.of(row) for row in packing.measure(1, tiny=True))
    assert efficiency.met and efficiency.unit == padding.unit == "tokens"
    assert padding.ours_s == efficiency.other_s
    assert 1 < padding.detail["sorted_by_length"] < padding.ratio
    assert set(planning.detail["pack_ns_per_token"]) == {"1000", "10000"}
    assert table.cells(padding)[2] == f"{padding.ours_s:,.0f} tokens"
    # Tokens are the same on every machine: their ratio is guarded as the seconds' are.
    worse = replace(padding, ratio=padding.ratio / 2, spread=(padding.ratio / 2,) * 2)
    assert regressions([padding], [worse])


def test_first_fit_needs_as_few_rows_as_a_careful_packing() -> None:
    sizes = packing.drawn(packing.run_lengths()[0], 500)
    rows = packing.first_fit(sizes, packing.BUDGET)
    found = packing.loads(sizes, rows)
    assert len(rows) >= math.ceil(sum(sizes) / packing.BUDGET)
    assert len(plan_microbatches(sizes, packing.BUDGET)) <= len(rows) == len(found)


def test_a_lost_sample_and_a_full_row_are_noticed() -> None:
    with pytest.raises(AssertionError, match="not every sample"):
        packing.loads([1, 2], [[0]])
    with pytest.raises(AssertionError, match="a microbatch of 1200 tokens"):
        packing.loads([600, 600], [[0, 1]])
