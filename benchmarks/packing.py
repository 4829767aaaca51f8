"""Packing: how full the microbatches are on lengths of a real run, and what it costs to plan them.

    python benchmarks/run.py packing

The lengths are those of data/climb_lengths.json, whose answers have 15 to 160 tokens. Three rows:

- efficiency: tokens against microbatches times the largest one, which is what a step costs if its
  microbatches run side by side. A microbatch itself has no padding. Pairs are the rollout batches
  of the run.
- padding: the tokens of microbatches that are padded to their longest sample, in the order of the
  rollout; sorted by length they are in `detail`.
- planning: seconds, against first-fit-decreasing by a plain loop over the microbatches, which must
  not need fewer of them. `detail` has what packing whole samples costs, from 10^3 tokens on.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import run
from harness import HERE, Pairs, paired, say, stamp

from gspo.data.best_fit import plan_microbatches
from gspo.data.packing import pack
from gspo.data.sample import Sample

LENGTHS = HERE / "data" / "climb_lengths.json"
BUDGET = 1024
GOAL = 0.97
PLANNED, PACKED = 10_000, 100_000
SIZES = (10**3, 10**4, 10**5, 10**6)
"""Tokens of the samples whose packing is timed."""
GROUP = 16
"""Samples of a group, as in the run."""


def measure(repeats: int | None = None, *, tiny: bool = False) -> list[dict[str, Any]]:
    """The three rows."""
    batches = run_lengths()
    every = [length for own in batches for length in own]
    planned, packed, sizes = (200, 100, SIZES[:2]) if tiny else (PLANNED, PACKED, SIZES)
    return [
        _efficiency(batches, drawn(every, planned)),
        _padding(batches),
        _planning(drawn(every, planned), drawn(every, packed), sizes, repeats or 5),
    ]


def run_lengths() -> list[list[int]]:
    """Of each rollout batch of the run, the tokens of its samples."""
    return json.loads(LENGTHS.read_text())["batches"]


def drawn(lengths: Sequence[int], count: int) -> list[int]:
    """Lengths drawn from a run's, the same each time."""
    return random.Random(0).choices(lengths, k=count)


def _efficiency(batches: Sequence[Sequence[int]], many: Sequence[int]) -> dict[str, Any]:
    plans = [loads(own, plan_microbatches(own, BUDGET)) for own in batches]
    pairs = Pairs(
        ours=tuple(float(len(microbatches) * max(microbatches)) for microbatches in plans),
        other=tuple(float(sum(own)) for own in batches),
    )
    large = loads(many, plan_microbatches(many, BUDGET))
    return _row(
        "balanced rows of a run's batches",
        batches,
        other="no token lost at all",
        **pairs.fields(),
        unit="tokens",
        goal=GOAL,
        detail={
            "rows": [len(microbatches) for microbatches in plans],
            "fewest_rows": [math.ceil(sum(own) / BUDGET) for own in batches],
            # If the batch is small, its last microbatch has room whatever the packing does.
            "filled": [sum(microbatches) / len(microbatches) / BUDGET for microbatches in plans],
            f"filled_{len(many)}": sum(large) / len(large) / BUDGET,
        },
    )


def _padding(batches: Sequence[Sequence[int]]) -> dict[str, Any]:
    tokens = tuple(float(sum(own)) for own in batches)
    pairs = Pairs(tokens, tuple(float(padded(own, BUDGET)) for own in batches))
    by_length = [padded(sorted(own), BUDGET) / sum(own) for own in batches]
    return _row(
        "against padding",
        batches,
        other="padded to the longest of a microbatch",
        **pairs.fields(),
        unit="tokens",
        detail={"sorted_by_length": statistics.median(by_length)},
    )


def _row(what: str, batches: Sequence[Sequence[int]], **fields: Any) -> dict[str, Any]:
    return stamp(
        name="packing",
        what=what,
        shape=f"{len(batches)} batches of {len(batches[0])} samples, rows of {BUDGET:,}",
        versions={"numpy": np.__version__},
        command="python benchmarks/run.py packing",
        **fields,
    ).as_dict()


def loads(sizes: Sequence[int], microbatches: Sequence[Sequence[int]]) -> list[int]:
    """Count the tokens of each microbatch.

    Raises:
        AssertionError: a sample is in no microbatch, or in two; or one is above the budget.
    """
    placed = sorted(item for microbatch in microbatches for item in microbatch)
    assert placed == list(range(len(sizes))), "not every sample is in one microbatch"
    found = [sum(sizes[item] for item in microbatch) for microbatch in microbatches]
    assert max(found) <= BUDGET, f"a microbatch of {max(found)} tokens"
    return found


def padded(lengths: Sequence[int], budget: int) -> int:
    """Tokens of microbatches in this order, each padded to its longest and at most `budget`.

    >>> padded([3, 5, 2, 2], budget=10)  # 2 x 5, and 2 x 2
    14
    """
    total = count = longest = 0
    for length in lengths:
        if (count + 1) * max(longest, length) > budget:
            total += count * longest
            count = longest = 0
        count, longest = count + 1, max(longest, length)
    return total + count * longest


def first_fit(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Put the largest first, each into the first microbatch that has room: a loop for each.

    >>> first_fit([6, 3, 5, 2], budget=8)
    [[0, 3], [2, 1]]
    """
    microbatches: list[list[int]] = []
    free: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[item]
        number = next((n for n, left in enumerate(free) if size <= left), len(microbatches))
        if number == len(microbatches):
            microbatches.append([])
            free.append(budget)
        microbatches[number].append(item)
        free[number] -= size
    return microbatches


def _planning(
    sizes: Sequence[int], packed: Sequence[int], tokens: Sequence[int], repeats: int
) -> dict[str, Any]:
    say(f"  planning {len(sizes):,} samples, packing up to {len(packed):,}")
    mine, theirs = plan_microbatches(sizes, BUDGET), first_fit(sizes, BUDGET)
    for plan in (mine, theirs):
        loads(sizes, plan)
    assert len(mine) <= len(theirs), f"{len(mine)} microbatches, first-fit needs {len(theirs)}"
    pairs = paired(
        lambda: plan_microbatches(sizes, BUDGET), lambda: first_fit(sizes, BUDGET), repeats=repeats
    )
    return stamp(
        name="packing",
        what="planning rows",
        shape=f"{len(sizes):,} samples of a run's lengths, rows of {BUDGET:,}",
        other="first-fit-decreasing, a plain loop",
        **pairs.fields(),
        detail={
            "rows": {"ours": len(mine), "other": len(theirs)},
            **packing_cost(packed, tokens),
        },
        versions={"numpy": np.__version__},
        command="python benchmarks/run.py packing",
    ).as_dict()


def packing_cost(lengths: Sequence[int], tokens: Sequence[int]) -> dict[str, Any]:
    """Seconds of packing all samples, tensors included, and ns per token of parts of them."""
    samples = [sample(number, length) for number, length in enumerate(lengths)]
    ends = np.cumsum(lengths)
    per_token = {}
    for wanted in tokens:
        own = samples[: max(1, int(np.searchsorted(ends, wanted)))]
        size = sum(map(len, own))
        # As many calls as a tenth of the largest size is: one of 10^3 tokens takes a millisecond.
        calls = max(3, min(100, tokens[-1] // wanted // 10))
        per_token[str(wanted)] = round(
            1e9 * _seconds(lambda own=own: pack(own, BUDGET), calls) / size
        )
    every = _seconds(lambda: pack(samples, BUDGET), 1)
    return {
        "pack_ns_per_token": per_token,
        f"pack_{len(samples)}_s": every,
        f"pack_{len(samples)}_tokens": int(ends[-1]),
    }


def _seconds(call: Callable[[], object], calls: int) -> float:
    """The median of some calls."""
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def sample(number: int, length: int, prompt: int = 6) -> Sample:
    """A sample of one turn; the run's prompts have 6 tokens."""
    mask = np.arange(length) >= prompt
    logprobs = np.zeros(length, np.float32)
    turns = np.where(mask, 0, -1)
    return Sample(
        tokens=np.zeros(length, np.int64),
        ratio_mask=mask,
        old_logprobs=logprobs,
        sampling_logprobs=logprobs,
        temperatures=np.ones(length, np.float32),
        turn_ids=turns,
        policy_versions=turns,
        trajectory_id=number,
        group_id=number // GROUP,
        advantage=1.0,
    )


def main() -> None:
    """As `run.py packing`."""
    raise SystemExit(run.main(["packing", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
