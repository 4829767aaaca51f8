"""How often the intervals of experiment/heldout.py and lab/statistics.py err, by simulation.

    python benchmarks/intervals.py            # 2 to 10 minutes; the tables of docs/compare.md
    python benchmarks/intervals.py --times 200

The tests run the same simulations with fewer draws.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable

from gspo.experiment.heldout import reward_interval
from gspo.lab.compare_result import collapsed
from gspo.lab.statistics import NO_DIFFERENCE, NO_INTERVAL, paired_difference, verdict

Law = Callable[[random.Random], float]
SIZES = (5, 9, 10, 15, 20)
PROMPTS = (4, 8, 16, 32, 64, 256)
MEANS = (0.3, 0.02, 0.005, 0.98)
ALIKE = (0.02, 0.2, 0.5, 0.8)
"""Correlations of two answers to one prompt."""


def share_of(probability: float, rollouts: int = 1024) -> Law:
    """A held-out reward near `probability`: a share of rollouts, with some spread over seeds."""
    error = math.sqrt(probability * (1 - probability) / rollouts)

    def law(rng: random.Random) -> float:
        value = rng.gauss(probability, error) + rng.gauss(0, 0.005)
        return round(min(max(value, 0.0), 1.0) * rollouts) / rollouts

    return law


def mostly(usual: float, share: float, other: Law) -> Law:
    """`usual` in a share of the seeds, else what `other` gives."""
    return lambda rng: usual if rng.random() < share else other(rng)


def below_one(rng: random.Random) -> float:
    """A reward that falls short of 1 by 0.05 on average."""
    return 1 - rng.expovariate(20)


LAWS: dict[str, Law] = {
    "normal": lambda rng: rng.gauss(0, 1),
    "near 0.98": share_of(0.98),
    "near 0.01": share_of(0.01),
    "75 % of the seeds at 1": mostly(1.0, 0.75, below_one),
    "90 % of the seeds at 1": mostly(1.0, 0.9, below_one),
    "10 % of the seeds collapse": lambda rng: rng.gauss(0.1 if rng.random() < 0.1 else 0.6, 0.03),
}
"""What a seed's reward may be like."""


def false_alarms(law: Law, seeds: int, times: int) -> float:
    """How often two arms of one law are called different."""
    rng = random.Random(seeds)
    alarms = 0
    for _ in range(times):
        a, b = ([law(rng) for _ in range(seeds)] for _ in "ab")
        alarms += verdict(paired_difference(a, b), "a", "b") not in (NO_DIFFERENCE, NO_INTERVAL)
    return alarms / times


def prompt_means(rng: random.Random, mean: float, alike: float, count: int) -> list[float]:
    """How likely the answer to each prompt is right."""
    spread = 1 / alike - 1
    return [rng.betavariate(mean * spread, (1 - mean) * spread) for _ in range(count)]


def answers(rng: random.Random, of_prompts: list[float], zero: float = 0.0) -> list[list[float]]:
    """Rewards of four answers to each prompt, `zero` if wrong and one more if right."""
    return [[zero + (rng.random() < p) for _ in range(4)] for p in of_prompts]


def coverage(mean: float, prompts: int, alike: float, times: int) -> tuple[float, float]:
    """How often the interval of held-out reward holds the mean, and its mean width."""
    rng = random.Random(prompts)
    held, widths = 0, 0.0
    for _ in range(times):
        found = reward_interval(answers(rng, prompt_means(rng, mean, alike, prompts)))
        assert found.low is not None and found.high is not None and found.low < found.high
        held += found.low <= mean <= found.high
        widths += found.high - found.low
    return held / times, widths / times


def false_collapses(
    mean: float, prompts: int, evaluations: int, times: int, zero: float = 0.0
) -> float:
    """How often a run in which nothing changes is called collapsed."""
    rng = random.Random(prompts)
    alarms = 0
    for _ in range(times):
        of_prompts = prompt_means(rng, mean, 0.1, prompts)
        runs = [reward_interval(answers(rng, of_prompts, zero)) for _ in range(evaluations)]
        alarms += collapsed(runs)
    return alarms / times


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="How often intervals err, by simulation.")
    parser.add_argument("--times", type=int, default=1000, help="draws of each entry")
    times = parser.parse_args().times
    print("Two arms of one law called different, by number of seeds\n")
    _row("a seed's reward", *SIZES)
    _row(*["---"] * (1 + len(SIZES)))
    for name, law in LAWS.items():
        _row(name, *(f"{false_alarms(law, size, 20 * times):.3f}" for size in SIZES))
    print("\nHeld-out intervals that hold the mean, least of all spreads, by number of prompts\n")
    _row("mean reward", *PROMPTS)
    _row(*["---"] * (1 + len(PROMPTS)))
    for mean in MEANS:
        least = (min(coverage(mean, n, alike, times)[0] for alike in ALIKE) for n in PROMPTS)
        _row(mean, *(f"{share:.3f}" for share in least))
    print("\nUnchanging runs called collapsed, by evaluations; rewards 0 and 1, then -1 and 0\n")
    _row("mean reward", "prompts", "2", "6", "25", "2", "6", "25")
    _row(*["---"] * 8)
    for mean, prompts in ((0.002, 256), (0.02, 256), (0.3, 256), (0.3, 8), (0.9, 8)):
        counts = [(count, zero) for zero in (0.0, -1.0) for count in (2, 6, 25)]
        found = (false_collapses(mean, prompts, count, times // 5, zero) for count, zero in counts)
        _row(mean, prompts, *(f"{share:.3f}" for share in found))


def _row(*values: object) -> None:
    print(f"| {' | '.join(map(str, values))} |", flush=True)


if __name__ == "__main__":
    main()
