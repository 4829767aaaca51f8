"""The vocabulary projection by itself: seconds, and the error of l_i, by how its products round.

1,000 sequences of 8 to 248 tokens: random hidden states, a head whose logits spread by 2, targets
sampled from it in float64. The error of l_i is the mean over a sequence's tokens of log-prob less
its float64 value: what the ratio would be off by if the other side were exact. `inside` says
whether the largest is at most 3e-4, the paper's clip range.

- `split`: gspo as it is on a GPU with `dtype="bfloat16"`: each factor as a sum of two bfloat16;
  three products of the four (`kernels/split_projection.py`).
- `float32`: gspo with `dtype="float32"`. `tf32`: the same under
  `torch.set_float32_matmul_precision("high")`.
- `bfloat16`: both factors rounded to bfloat16, products summed in float32.

Timed there is the scoring pass, without gradients. Then 8,192 tokens forward and backward with a
trained head, split, in float32 and tf32; and against full logits, Liger and cut-cross-entropy,
where these are installed, all in bfloat16 (Liger and cut-cross-entropy multiply in it: `gaps` says
by how much they differ).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import logprob
import torch
from logprob import Case, Inputs, Outcome, Side
from torch import Tensor

from gpu_parts.bench import Bench
from gpu_parts.profiling import precision
from gspo.kernels import projection
from gspo.kernels.logprob import Head, token_logprobs

CLIP = 3e-4
EXACT = {"logprob": 1e-3, "gradient": 3e-2}
"""Tolerances where both sides sum in float32; the gradients are bfloat16."""
ROUNDED = {"logprob": 0.2, "gradient": 0.1}
"""Tolerances where a logit of some 10 may be a bfloat16, of 8 bits."""


class Text(NamedTuple):
    """Tokens of sequences one after the other, and their log-probs in float64."""

    hidden: Tensor
    weight: Tensor
    lengths: Tensor
    targets: Tensor
    exact: Tensor


def measure(bench: Bench) -> None:
    """Scoring, then gradients, then the peers."""
    text = None
    with bench.row("float64 reference") as row:
        text = make_text(bench)
        row |= {"sequences": len(text.lengths), "tokens": len(text.hidden)}
        row["vocabulary"] = len(text.weight)
    for name, way in WAYS.items():
        with bench.row(f"{name}: score") as row, way():
            assert text is not None, "no reference to compare with"
            row |= score(bench, text, split=name == "split")
    del text
    with bench.row("forward and backward, trained head") as row:
        row |= _gradients(bench)
    for trained in (False, True):
        for peer, (side, module) in PEERS.items():
            if module is not None and importlib.util.find_spec(module) is None:
                continue
            what = f"{'trained' if trained else 'frozen'} head, bfloat16, against {peer}"
            with bench.row(what) as row:
                row |= _beside(bench, trained, side, module)


def make_text(bench: Bench) -> Text:
    """Random sequences, the same each time on one kind of device."""
    device = bench.card.device
    count, longest = bench.size((1000, 248), (8, 12))
    vocabulary, width = bench.size((151_936, 896), (512, 32))
    rng = torch.Generator(device).manual_seed(0)
    lengths = torch.linspace(min(8, longest), longest, count).round().long()
    hidden = torch.randn(int(lengths.sum()), width, device=device, generator=rng)
    weight = torch.randn(vocabulary, width, device=device, generator=rng) * (2 / width**0.5)
    targets, exact = [], []
    wide = weight.double().t()
    for part in hidden.split(1024):
        logprobs = (part.double() @ wide).log_softmax(-1)
        drawn = torch.multinomial(logprobs.exp(), 1, generator=rng)
        targets.append(drawn[:, 0])
        exact.append(logprobs.gather(-1, drawn)[:, 0])
    return Text(hidden, weight, lengths.to(device), torch.cat(targets), torch.cat(exact))


def score(bench: Bench, text: Text, *, split: bool) -> dict[str, Any]:
    """Seconds of the scoring pass, and its errors."""
    ones = torch.ones(len(text.hidden), device=text.hidden.device)
    found: list[Tensor] = []
    head = Head(text.weight, split=split)

    def work() -> None:
        with torch.no_grad():
            out = token_logprobs(text.hidden, head, text.targets, ones)
        found[:] = [out.logprobs]

    times = bench.time(work, repeats=2)
    error = found[0].double() - text.exact
    owner = torch.repeat_interleave(
        torch.arange(len(text.lengths), device=ones.device), text.lengths
    )
    mean = torch.zeros(len(text.lengths), dtype=torch.float64, device=ones.device)
    mean = mean.index_add(0, owner, error) / text.lengths
    largest = mean.abs().max().item()
    return times | {
        "token_error_max": error.abs().max().item(),
        "token_error_mean": error.mean().item(),
        "sequence_error_max": largest,
        "sequence_error_rms": mean.square().mean().sqrt().item(),
        "share_beyond": (mean.abs() > CLIP).double().mean().item(),
        "inside": largest <= CLIP,
    }


Product = Callable[[Tensor, Tensor], Tensor]


def rounded(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T of bfloat16, summed in float32."""
    if a.device.type == "cuda":
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    return a.float() @ b.float().t()


def once(hidden: Tensor, weight: Tensor) -> Tensor:
    """The product of the rounded factors."""
    return rounded(hidden.bfloat16(), weight.bfloat16())


@contextmanager
def _projected(product: Product) -> Iterator[None]:
    """Inside, gspo's forward pass of the head multiplies by `product`."""

    def project(hidden: Tensor, weight: Tensor, bias: None, softcap: None) -> Tensor:
        assert bias is None and softcap is None
        return product(hidden.float(), weight)

    with mock.patch.object(projection, "project", project):
        yield


WAYS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "split": nullcontext,
    "float32": nullcontext,
    "tf32": lambda: precision("high"),
    "bfloat16": lambda: _projected(once),
}


def _case(bench: Bench, trained: bool) -> Case:
    return Case("head", *bench.size((8192, 151_936, 896), (32, 512, 16)), trained=trained)


def _gradients(bench: Bench) -> dict[str, Any]:
    """Split, float32 and tf32 of one batch: seconds, and by how much the gradients differ."""
    given = logprob.inputs(_case(bench, True), bench.card.device)
    out: dict[str, Any] = {}
    results = {}
    for name in ("split", "float32", "tf32"):

        def side(given: Inputs, split: bool = name == "split") -> Outcome:
            head = Head(given.weight, split=split)
            found = token_logprobs(given.hidden, head, given.targets, given.temperatures)
            gradients = torch.autograd.grad(found.logprobs, given.leaves, given.coefficients)
            return Outcome(found.logprobs, found.entropy, gradients)

        with WAYS[name]():
            out[name] = bench.time(lambda: side(given))
            out[name]["added_bytes"] = added_bytes(side, given, bench)
            results[name] = side(given)
    exact = results.pop("float32").gradients
    for name, found in results.items():
        pairs = zip(("d_hidden", "d_weight"), found.gradients, exact, strict=True)
        gaps = {which: ((a - b).norm() / b.norm()).item() for which, a, b in pairs}
        out[f"{name}: gradient_gaps"] = gaps
    return out


def _beside(bench: Bench, trained: bool, side: Side, module: str | None) -> dict[str, Any]:
    """Ours and a peer in turns, compared before a figure is believed."""
    given = logprob.inputs(_case(bench, trained), bench.card.device, torch.bfloat16)
    if module is not None:  # they know no temperatures
        given = given._replace(temperatures=torch.ones_like(given.temperatures))
    tolerance = EXACT if module is None else ROUNDED
    gaps = logprob.check(_in_float32(side(given)), _in_float32(logprob.ours(given)), **tolerance)
    ours = bench.time(lambda: logprob.ours(given))
    theirs = bench.time(lambda: side(given))
    return {
        "ours_s": ours["median_s"],
        "other_s": theirs["median_s"],
        "ours": ours,
        "other": theirs,
        "ours_bytes": added_bytes(logprob.ours, given, bench),
        "other_bytes": added_bytes(side, given, bench),
        "gaps": gaps,
    }


def _in_float32(out: Outcome) -> Outcome:
    return out._replace(gradients=tuple(g.float() for g in out.gradients))


def added_bytes(side: Side, given: Inputs, bench: Bench) -> int | None:
    """What a call adds to the device's allocated memory at its peak; None on the CPU."""
    before = bench.card.memory()["now"]
    bench.card.reset_peak()
    side(given)
    peak = bench.card.memory()["peak"]
    return None if before is None or peak is None else peak - before


def liger(given: Inputs) -> Outcome:
    """Liger's fused projection and cross entropy, with one coefficient for each token."""
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyLoss,
    )

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return _negated(loss(given.weight, given.hidden, given.targets), given)


def cut(given: Inputs) -> Outcome:
    """Apple's cut-cross-entropy, as it comes: it skips gradients below a threshold."""
    from cut_cross_entropy import (  # pyright: ignore[reportMissingImports]
        linear_cross_entropy,
    )

    loss = linear_cross_entropy(given.hidden, given.weight, given.targets, reduction="none")
    return _negated(loss, given)


def _negated(loss: Tensor, given: Inputs) -> Outcome:
    logprobs = -loss.float()
    gradients = torch.autograd.grad(logprobs, given.leaves, given.coefficients)
    return Outcome(logprobs.detach(), None, gradients)


PEERS: dict[str, tuple[Side, str | None]] = {
    "full logits, autograd": (logprob.naive, None),
    "Liger": (liger, "liger_kernel"),
    "cut-cross-entropy": (cut, "cut_cross_entropy"),
}
