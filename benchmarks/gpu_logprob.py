"""Log-probs without full logits on a GPU: against the naive way, Liger and cut-cross-entropy.

    python benchmarks/run.py gpu_logprob         # --tiny: the same code on the CPU
    pip install liger-kernel cut-cross-entropy   # both optional; missing ones are left out

Hidden states and head in bfloat16, 8,192 tokens x 262,144 entries, forward and backward, with the
head frozen and trained. The naive way computes float32 logits, as this package does in blocks.
Liger's and cut-cross-entropy's kernels multiply in bfloat16, know neither temperatures nor
entropies, and cut-cross-entropy skips gradients below a threshold: against them the temperature is
1, and `detail.gaps` says by how much each differs from ours. Memory is what a call adds to the
allocator's peak.

Not run by the authors: no GPU was at hand.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import gpu
import logprob
import run
import torch
from harness import Pairs, paired, say, stamp, versions
from logprob import Case, Inputs, Outcome, Side

EXACT = {"logprob": 1e-3, "gradient": 2e-2}
"""Tolerances where both multiply in float32; the gradients are bfloat16."""
ROUNDED = {"logprob": 0.2, "gradient": 0.1}
"""Tolerances where a logit of some 10 may be a bfloat16, of 8 bits."""


def cases(tiny: bool = False) -> list[Case]:
    """A frozen head, as with LoRA, and a trained one."""
    sizes = (32, 512, 16) if tiny else (8192, 262_144, 1024)
    return [
        Case("frozen head", *sizes, trained=False),
        Case("trained head", *sizes),
    ]


def liger(given: Inputs) -> Outcome:
    """Liger's fused projection and cross entropy.

    Versions whose backward pass took one coefficient for all tokens fail the comparison; 0.8.5
    takes one for each, and computes the logits again for that.
    """
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyLoss,
    )

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return _negated(loss(given.weight, given.hidden, given.targets), given)


def cut(given: Inputs) -> Outcome:
    """Apple's cut-cross-entropy, as it comes."""
    from cut_cross_entropy import (  # pyright: ignore[reportMissingImports]
        linear_cross_entropy,
    )

    loss = linear_cross_entropy(given.hidden, given.weight, given.targets, reduction="none")
    return _negated(loss, given)


def _negated(loss: torch.Tensor, given: Inputs) -> Outcome:
    logprobs = -loss.float()
    gradients = torch.autograd.grad(logprobs, given.leaves, given.coefficients)
    return Outcome(logprobs.detach(), None, gradients)


PEERS: dict[str, tuple[Side, str | None]] = {
    "full logits, autograd": (logprob.naive, None),
    "Liger": (liger, "liger_kernel"),
    "cut-cross-entropy": (cut, "cut_cross_entropy"),
}


def measure(repeats: int | None = None, *, tiny: bool = False) -> list[dict[str, Any]]:
    """A row for each head and each peer that is installed and fits.

    Raises:
        Unavailable: no CUDA device.
    """
    on = gpu.card(tiny=tiny)
    rows = []
    for case in cases(tiny):
        for peer, (side, module) in PEERS.items():
            if (reason := _missing(module, on)) is not None:
                say(f"  {case.what}, {peer}: left out, {reason}")
                continue
            try:
                rows.append(_row(case, peer, side, module, on, repeats or 7))
            except torch.OutOfMemoryError:
                say(f"  {case.what}, {peer}: left out, it does not fit the device's memory")
    return rows


def _missing(module: str | None, on: gpu.Card) -> str | None:
    """Why a peer cannot be measured; None where it can."""
    if module is None:
        return None
    if on.device != "cuda":
        return "its kernels need a CUDA device"
    if importlib.util.find_spec(module) is None:
        return f"not installed: pip install {module.replace('_', '-')}"
    return None


def _row(
    case: Case, peer: str, side: Side, module: str | None, on: gpu.Card, repeats: int
) -> dict[str, Any]:
    given = logprob.inputs(case, on.device, torch.bfloat16)
    if module is not None:
        given = given._replace(temperatures=torch.ones_like(given.temperatures))
    tolerance = EXACT if module is None else ROUNDED
    gaps = logprob.check(_in_float32(side(given)), _in_float32(logprob.ours(given)), **tolerance)
    pairs = _paired(given, side, on, repeats)
    return stamp(
        name="gpu_logprob",
        what=f"{case.what}, {peer}",
        shape=f"{case.sizes}, bfloat16",
        other=peer,
        **pairs.fields(),
        ours_mb=added_mb(logprob.ours, given, on),
        other_mb=added_mb(side, given, on),
        detail={"gaps": gaps},
        machine=gpu.machine_of(on),
        versions=versions("torch", *([module.replace("_", "-")] if module else [])),
        command="python benchmarks/run.py gpu_logprob",
    ).as_dict()


def _paired(given: Inputs, other: Side, on: gpu.Card, repeats: int) -> Pairs:
    def timed(side: Side) -> Callable[[], None]:
        def call() -> None:
            side(given)
            gpu.synchronize(on)

        return call

    gpu.synchronize(on)
    return paired(timed(logprob.ours), timed(other), repeats=repeats, warmup=2)


def _in_float32(out: Outcome) -> Outcome:
    return out._replace(gradients=tuple(g.float() for g in out.gradients))


def added_mb(side: Side, given: Inputs, on: gpu.Card) -> float | None:
    """What a call adds to the device's allocated memory at its peak; None on the CPU."""
    if on.device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side(given)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def main() -> None:
    """As `run.py gpu_logprob`."""
    raise SystemExit(run.main(["gpu_logprob", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
