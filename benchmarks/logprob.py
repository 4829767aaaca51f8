"""Log-probs and entropies without full logits, against the naive way, on the CPU.

    python benchmarks/run.py logprob

The naive way: all logits in float32, `log_softmax`, `gather`, backward by autograd; as thrifty as
it can be without a kernel of its own (temperatures in place, entropies 128 tokens at a time). Both
sides give log-probs, entropies, and the gradient for coefficients of both signs; they are compared
before a figure is believed. Times: in turns in one process, 2 threads. Memory: what a call adds to
the peak of a fresh process.

The naive way holds three times the logits: at 8,192 x 262,144 more than 25 GB. Where the machine
lacks that, it is measured at 2,048 tokens, and `detail.at_8192` says what was extrapolated.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import run
import torch
from harness import Pairs, paired, say, stamp
from torch import Tensor

from gspo.kernels.logprob import Head, token_logprobs

TIME_GOAL = 0.87
"""1 / 1.15: at most 1.15 times the naive way's time."""
MEMORY_GOAL = 0.1
FEW, LARGE = 512, 8192
"""Tokens of the second point that memory is extrapolated from, and those that it is wanted at."""


@dataclass(frozen=True)
class Case:
    """M tokens of width D, V entries of vocabulary.

    Attributes:
        what: in words.
        trained: the head's weight gets a gradient too.
        memory: measure it, each side in a process of its own.
        memory_goal: the share of the naive way's memory that is aimed at.
        few, large: tokens of further measurements of memory, see `FEW` and `LARGE`; 0 for none.
    """

    what: str
    tokens: int
    vocabulary: int
    width: int
    trained: bool = True
    memory: bool = False
    memory_goal: float | None = None
    few: int = 0
    large: int = 0
    threads: int = 2

    @property
    def sizes(self) -> str:
        """For the table."""
        return f"{self.tokens:,} x {self.vocabulary:,}, width {self.width}"

    @property
    def shape(self) -> str:
        """The sizes, and how they are computed here."""
        return f"{self.sizes}, float32, {self.threads} thread{'s' * (self.threads > 1)}"


def cases(tiny: bool = False) -> list[Case]:
    """Two of Gemma's vocabulary, which is mostly logits; the embedded models'; a Qwen of 0.5B."""
    if tiny:
        sizes = {"memory": True, "memory_goal": MEMORY_GOAL, "few": 128, "large": 512}
        return [
            Case("frozen head", 32, 512, 8, trained=False, threads=1),
            Case("trained head", 256, 8192, 8, threads=1, **sizes),
        ]
    gemma = {"memory": True, "memory_goal": MEMORY_GOAL, "few": FEW, "large": LARGE}
    return [
        Case("frozen head", 2048, 262_144, 64, trained=False, **gemma),
        Case("trained head", 2048, 262_144, 64, **gemma),
        Case("trained head, embedded model's vocabulary", 8192, 103, 64),
        Case("trained head, Qwen2.5-0.5B's", 1024, 151_936, 896, memory=True),
    ]


class Inputs(NamedTuple):
    """What both sides get. The coefficient of a token is the loss's gradient by its log-prob."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    temperatures: Tensor
    coefficients: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that get a gradient."""
        return [x for x in (self.hidden, self.weight) if x.requires_grad]


class Outcome(NamedTuple):
    """What both sides give. The entropies are None where a peer has none."""

    logprobs: Tensor
    entropy: Tensor | None
    gradients: tuple[Tensor, ...]


Side = Callable[[Inputs], Outcome]


def inputs(case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Inputs:
    """Random ones, the same each time; logits spread by 2, no coefficient 0."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.tokens, case.width, generator=rng)
    weight = torch.randn(case.vocabulary, case.width, generator=rng) * (2 / case.width**0.5)
    signs = torch.where(torch.arange(case.tokens) % 2 == 0, 1.0, -1.0)
    return Inputs(
        hidden=hidden.to(device, dtype).requires_grad_(),
        weight=weight.to(device, dtype).requires_grad_(case.trained),
        targets=torch.randint(case.vocabulary, (case.tokens,), generator=rng).to(device),
        temperatures=(0.8 + 0.4 * torch.rand(case.tokens, generator=rng)).to(device),
        coefficients=(signs * (0.5 + torch.rand(case.tokens, generator=rng))).to(device),
    )


def ours(given: Inputs) -> Outcome:
    """`gspo.kernels.logprob`."""
    head = Head(given.weight, split=given.weight.is_cuda)  # on a GPU as with dtype="bfloat16"
    out = token_logprobs(given.hidden, head, given.targets, given.temperatures)
    return Outcome(out.logprobs, out.entropy, _gradients(out.logprobs, given))


def naive(given: Inputs) -> Outcome:
    """All logits at once, in float32."""
    logits = given.hidden.float() @ given.weight.float().t()
    every = logits.div_(given.temperatures[:, None]).log_softmax(-1)
    del logits
    with torch.no_grad():
        entropy = torch.cat([-(part.exp() * part).sum(-1) for part in every.split(128)])
    logprobs = every.gather(-1, given.targets[:, None]).squeeze(-1)
    del every  # the graph holds it
    return Outcome(logprobs, entropy, _gradients(logprobs, given))


def _gradients(logprobs: Tensor, given: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(logprobs, given.leaves, given.coefficients)


SIDES: dict[str, Side] = {"ours": ours, "naive": naive}


def measure(repeats: int | None = None, *, tiny: bool = False) -> list[dict[str, Any]]:
    """A row for each case."""
    return [_row(case, repeats or 3) for case in cases(tiny)]


def _row(case: Case, repeats: int) -> dict[str, Any]:
    say(f"  {case.what}, {case.shape}")
    torch.set_num_threads(case.threads)
    pairs, gaps = _timed(case, repeats)
    fields = pairs.fields()
    memory, large = _memory(case, fields["other_s"]) if case.memory else ({}, {})
    return stamp(
        name="logprob",
        what=case.what,
        shape=case.shape,
        other="full logits, autograd",
        **fields,
        **memory,
        goal=TIME_GOAL,
        memory_goal=case.memory_goal,
        detail={"gaps": gaps, **large},
        versions={"torch": torch.__version__},
        command="python benchmarks/run.py logprob",
    ).as_dict()


def _timed(case: Case, repeats: int) -> tuple[Pairs, dict[str, float]]:
    """Both sides in turns, and the differences of what they gave last."""
    given = inputs(case)
    last: dict[str, Outcome] = {}

    def side(name: str) -> Callable[[], None]:
        def call() -> None:
            last.pop(name, None)  # as in training: the last call's gradients are gone
            last[name] = SIDES[name](given)

        return call

    _warm_up(case)
    pairs = paired(side("ours"), side("naive"), repeats=repeats, warmup=0)
    return pairs, check(last["ours"], last["naive"])


def _warm_up(case: Case) -> None:
    small = inputs(replace(case, tokens=64, vocabulary=512))
    for side in SIDES.values():
        side(small)


def check(
    got: Outcome, wanted: Outcome, logprob: float = 5e-5, gradient: float = 1e-4
) -> dict[str, float]:
    """The largest differences; gradients' relative to the largest entry.

    Against float64, 262,144 entries: ours is off by 2e-6 (log-probs) and 3e-6 (entropy), the naive
    way by 1e-5 and 7e-5. So an entropy may differ by four times as much as a log-prob.

    Raises:
        AssertionError: one is above its tolerance, or a gradient is missing.
    """
    gaps = {"logprob": _gap(got.logprobs, wanted.logprobs)}
    if got.entropy is not None and wanted.entropy is not None:
        gaps["entropy"] = _gap(got.entropy, wanted.entropy)
    for name, a, b in zip(("d_hidden", "d_weight"), got.gradients, wanted.gradients, strict=False):
        gaps[name] = _gap(a, b) / float(b.abs().max())
    assert len(got.gradients) == len(wanted.gradients), "one side gave fewer gradients"
    for name, gap in gaps.items():
        allowed = {"logprob": logprob, "entropy": 4 * logprob}.get(name, gradient)
        assert gap <= allowed, f"{name} is off by {gap:.2g}, {allowed:g} allowed"
    return gaps


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).abs().max())


def _memory(case: Case, naive_s: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row's peaks, and what is known of `case.large` tokens."""
    mine, theirs = fresh_peak("ours", case), fresh_peak("naive", case)
    peaks = {"ours_mb": mine.mb, "other_mb": theirs.mb}
    if not case.large:
        return peaks, {}
    large = replace(case, tokens=case.large)
    needed = extrapolated(
        (case.few, fresh_peak("naive", replace(case, tokens=case.few)).mb),
        (case.tokens, theirs.mb),
        case.large,
    )
    own = fresh_peak("ours", large)
    if available_mb() > 1.1 * needed:
        full, how = fresh_peak("naive", large), "measured"
    else:
        full = Peak(needed, naive_s * case.large / case.tokens)
        how = (
            f"extrapolated linearly, it does not fit here: time from {case.tokens} tokens, "
            f"memory from {case.few} and {case.tokens}"
        )
    found = {
        "ours_s": own.seconds,
        "ours_mb": own.mb,
        "naive": how,
        "naive_s": full.seconds,
        "naive_mb": full.mb,
        "memory_share": own.mb / full.mb,
    }
    return peaks, {f"at_{case.large}": found}


def extrapolated(first: tuple[int, float], second: tuple[int, float], at: int) -> float:
    """The straight line through two points.

    >>> extrapolated((512, 1.5), (2048, 4.5), 8192)
    16.5
    """
    (x0, y0), (x1, y1) = first, second
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


class Peak(NamedTuple):
    """What one call added to its process, and the seconds that it took."""

    mb: float
    seconds: float


def fresh_peak(side: str, case: Case) -> Peak:
    """`peak` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(peak, side, case).result()


def peak(side: str, case: Case) -> Peak:
    """One call, after one of toy size. VmHWM is set back to what is resident before the call."""
    torch.set_num_threads(case.threads)
    _warm_up(case)
    given = inputs(case)
    Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status")
    before, started = _field(status, "VmRSS"), time.perf_counter()
    out = SIDES[side](given)
    seconds = time.perf_counter() - started
    assert len(out.gradients) == len(given.leaves)
    return Peak(_field(status, "VmHWM") - before, seconds)


def _field(path: Path, name: str) -> float:
    """MB in a line of a file of the kernel."""
    lines = path.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(name))


def available_mb() -> float:
    """Memory that is free, or would be when asked for."""
    return _field(Path("/proc/meminfo"), "MemAvailable")


def main() -> None:
    """As `run.py logprob`."""
    raise SystemExit(run.main(["logprob", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
