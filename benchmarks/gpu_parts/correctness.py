"""Are the numbers right on this device? Packed against plain, and engine against trainer.

Small models of random weights (dense, Mixture of Experts, sliding windows; seven queries to a key)
score samples of uneven lengths in groups that share prompts: packed into a microbatch, with prompts
computed once and without, against one plain forward pass of transformers for each sample, full
logits, in float32. Compared are log-probs of tokens, means over sequences (l_i), and the gradient
of a weighted sum of the log-probs. `ok` is said by these rules:

- float32: no token is off by more than 1e-3, no gradient by more than 1e-3 of its largest entry.
- bfloat16: the packed pass is no further from the float32 one than twice what the plain bfloat16
  pass is: in root mean square over tokens, and in the norm of the whole gradient. Dense models
  only: rounding flips experts, and one flipped expert decides how far two MoE passes are apart.
- engine against trainer: float32 tokens within 1e-3. In bfloat16 the numbers are only reported.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpu_parts import models
from gpu_parts.bare import ROOT
from gpu_parts.bench import Bench, free
from gspo.data.packing import Microbatch, pack
from gspo.data.sample import Sample
from gspo.policy.policy import Policy
from gspo.serve.engine import Request, SamplingParams
from gspo.serve.selfcheck import check_engine
from gspo.serve.torch_engine import TorchEngine
from gspo.weights.rollout_copy import RoundedCopy

TOKEN, GRADIENT, WORSE = 1e-3, 1e-3, 2.0
CLIP = 3e-4
_SMALL: dict[str, Any] = {"vocab_size": 1024, "num_hidden_layers": 4}
_TESTS, _TOOLS = "tests/kernels", ("pytest", "beartype", "hypothesis")
_TEST_S = 15
"""Seconds that must be left for the repository's own tests to begin."""


def configs(*, tiny: bool) -> dict[str, Any]:
    """What is checked; the heads are the large models', whose compiled kernels are used again.

    Weights spread so far that logits differ by about 1: else any attention would do.
    """
    small = {} if tiny else _SMALL
    small |= {"initializer_range": (32 if tiny else 896) ** -0.5}
    thin = small | {"intermediate_size": 256}
    window = {"use_sliding_window": True, "sliding_window": 6 if tiny else 48}
    window |= {"max_window_layers": 1}  # that many layers see everything
    return {
        "dense": models.dense(tiny=tiny, **thin),
        "MoE": models.moe(tiny=tiny, **(small if tiny else small | {"num_experts": 8})),
        "sliding windows": models.dense(tiny=tiny, **(thin | window)),
    }


def measure(bench: Bench) -> None:
    """Each model in float32 and bfloat16; then the tests of the repository that need a GPU."""
    for name, config in configs(tiny=bench.tiny).items():
        policy = half = None
        with bench.row(f"{name}: load") as row:
            policy = models.policy_of(config, bench.card, dtype="float32")
            half = models.policy_of(config, bench.card)
            half.round_weights()
            row["packing"], row["shares_prompts"] = policy.packing, policy.shares_prompts
            row["ok"] = policy.shares_prompts and policy.packing == bench.size("flex", "tiles")
        if policy is None or half is None:
            continue
        _packed(bench, policy, half, name)
        _engines(bench, policy, half, name)
        del policy, half
        free()
    _tests(bench)


class Scored(NamedTuple):
    """Log-probs of the sampled tokens in the order of the samples, and a gradient by name."""

    logprobs: Tensor
    gradient: dict[str, Tensor]


def _packed(bench: Bench, policy: Policy, half: Policy, name: str) -> None:
    samples = _samples(bench, policy)
    expected: Scored | None = None
    with bench.row(f"{name}: plain, float32") as row:
        expected = plain(policy, samples)
        row["tokens"] = len(expected.logprobs)
    if expected is None:
        return
    for share in (True, False):
        with bench.row(f"{name}, float32, shared prompts: {share}") as row:
            row |= differences(packed(policy, samples, share), expected, samples)
            row["ok"] = row["token_max"] <= TOKEN and row["gradient_max"] <= GRADIENT
    noise: dict[str, float] = {}
    with bench.row(f"{name}, bfloat16, plain") as row:
        noise = differences(plain(half, samples), expected, samples)
        row |= noise
    for share in (True, False):
        with bench.row(f"{name}, bfloat16, shared prompts: {share}") as row:
            row |= differences(packed(half, samples, share), expected, samples)
            keys = ("token_rms", "gradient_norm")
            if not policy.routers.modules:  # one flipped expert is more than rounding
                row["ok"] = all(row[key] <= WORSE * noise[key] for key in keys)


def _samples(bench: Bench, policy: Policy) -> list[Sample]:
    """Two groups behind long prompts, and two samples behind short ones; all of other lengths."""
    rng = np.random.default_rng(0)
    vocabulary = policy.head.weight.shape[0]
    long, short = bench.size((150, 70), (24, 12))
    samples: list[Sample] = []
    for group, (prompt, size) in enumerate(((long, 3), (long, 3), (3, 1), (3, 1))):
        first = rng.integers(vocabulary, size=prompt)
        for number in range(len(samples), len(samples) + size):
            tokens = np.concatenate([first, rng.integers(vocabulary, size=short - number)])
            samples.append(models.sample(tokens, prompt, number, group))
    return samples


def _coefficients(count: int, device: torch.device) -> Tensor:
    """Of both signs, the same for each way of computing."""
    return torch.cos(torch.arange(count, device=device) * 0.7)


def _gradient(policy: Policy, logprobs: Tensor) -> Scored:
    (logprobs * _coefficients(len(logprobs), logprobs.device)).sum().backward()
    found = {n: p.grad for n, p in policy.trainable.items() if p.grad is not None}
    policy.lm.zero_grad(set_to_none=True)
    return Scored(logprobs.detach(), found)


def packed(policy: Policy, samples: Sequence[Sample], share: bool) -> Scored:
    """Score all samples in one microbatch, as the trainer computes them."""
    (microbatch,) = pack(list(samples), 100_000, share=share)
    order = _in_order(microbatch, samples)
    return _gradient(policy, policy.logprobs(microbatch).logprobs[order.to(policy.device)])


def _in_order(microbatch: Microbatch, samples: Sequence[Sample]) -> Tensor:
    """Find the places in the microbatch of the sampled tokens, one sample after the other."""
    sizes = {sample.trajectory_id: sample.sampled for sample in samples}
    ends = np.cumsum([sizes[t] for t in microbatch.trajectory_ids])
    begins = dict(zip(microbatch.trajectory_ids, ends, strict=True))
    return torch.from_numpy(
        np.concatenate(
            [np.arange(sizes[t]) + begins[t] - sizes[t] for t in (s.trajectory_id for s in samples)]
        )
    )


def plain(policy: Policy, samples: Sequence[Sample]) -> Scored:
    """One forward pass of transformers for each sample, with full logits."""
    parts = []
    for sample in samples:
        tokens = torch.from_numpy(sample.tokens)[None].to(policy.device)
        logits = policy.lm(input_ids=tokens, use_cache=False).logits[0, :-1]
        logprobs = logits.float().log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
        parts.append(logprobs[torch.from_numpy(sample.ratio_mask[1:]).to(policy.device)])
    return _gradient(policy, torch.cat(parts))


def differences(got: Scored, wanted: Scored, samples: Sequence[Sample]) -> dict[str, float]:
    """How far apart; gradients relative to the largest entry, and to the norm, of the wanted."""
    assert set(got.gradient) == set(wanted.gradient), "gradients of different parameters"
    gap = got.logprobs.double() - wanted.logprobs.double()
    means = [part.mean() for part in gap.split([sample.sampled for sample in samples])]
    pairs = [(own, wanted.gradient[name]) for name, own in got.gradient.items()]
    off = sum(float((a - b).double().square().sum()) for a, b in pairs)
    whole = sum(float(b.double().square().sum()) for _, b in pairs)
    return {
        "token_max": gap.abs().max().item(),
        "token_rms": gap.square().mean().sqrt().item(),
        "sequence_max": torch.stack(means).abs().max().item(),
        "gradient_max": max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs),
        "gradient_norm": (off / whole) ** 0.5,
    }


def _engines(bench: Bench, policy: Policy, half: Policy, name: str) -> None:
    """What engines sampled, scored by the trainer on the same weights."""
    copy = RoundedCopy(policy, "bfloat16").policy
    for what, trainer, sampler in (
        ("float32", policy, policy),
        ("bfloat16", half, half),
        ("bfloat16, engine on a copy", half, copy),
    ):
        with bench.row(f"{name}, engine against trainer, {what}") as row:
            row |= _engine(bench, trainer, sampler)
            if trainer is policy:
                row["ok"] = row["token_max"] <= TOKEN


def _engine(bench: Bench, policy: Policy, sampler: Policy) -> dict[str, float]:
    engine = TorchEngine(sampler)
    check_engine(engine)
    size, length = bench.size((16, 64), (4, 8))
    rng = np.random.default_rng(0)
    params = SamplingParams(n=size, max_tokens=length, seed=0, ignore_eos=True)
    vocabulary = policy.head.weight.shape[0]
    requests = [
        Request(tuple(rng.integers(vocabulary, size=own).tolist()), params) for own in (40, 25)
    ]
    samples = []
    for group, done in enumerate(engine.generate(requests)):
        for completion in done:
            tokens = np.array([*requests[group].prompt, *completion.token_ids])
            sample = models.sample(tokens, len(requests[group].prompt), len(samples), group)
            sample.sampling_logprobs[sample.ratio_mask] = completion.logprobs
            samples.append(sample)
    (microbatch,) = pack(samples, 100_000, share=policy.shares_prompts)
    # With gradients, as in training: the kernels are those that were compiled before.
    logprobs = policy.logprobs(microbatch).logprobs.detach().cpu().double()
    gap = logprobs - microbatch.sampling_logprobs.double()
    means = torch.stack([part.mean() for part in gap.split(length)]).abs()
    return {
        "sequences": len(samples),
        "token_max": gap.abs().max().item(),
        "token_rms": gap.square().mean().sqrt().item(),
        "sequence_max": means.max().item(),
        "share_beyond_clip": (means > CLIP).double().mean().item(),
    }


def _tests(bench: Bench) -> None:
    """The tests marked `gpu`, in this process; on the CPU they skip themselves."""
    with bench.row("tests marked gpu") as row:
        missing = [own for own in _TOOLS if importlib.util.find_spec(own) is None]
        if missing:
            row["left_out"] = f"not installed: {', '.join(missing)}"
            return
        if bench.left() < _TEST_S:
            raise TimeoutError(f"{bench.left():.0f} s are left, they need {_TEST_S}")
        row |= run_tests()
        row["ok"] = row["failed"] == 0 and (row["passed"] > 0 or bench.tiny)


class Outcomes:
    """A plugin of pytest that counts how tests end."""

    def __init__(self) -> None:
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1


def run_tests() -> dict[str, Any]:
    """Run the GPU tests of tests/kernels with pytest, without the project's settings: those
    name plugins that a bare machine lacks."""
    import pytest

    arguments = ["-c", os.devnull, "--rootdir", str(ROOT), "--import-mode=importlib", "-q"]
    arguments += ["-m", "gpu"]
    for plugin in ("cacheprovider", "xdist", "timeout", "asyncio", "warnings"):
        arguments += ["-p", f"no:{plugin}"]
    threads, outcomes, said = torch.get_num_threads(), Outcomes(), io.StringIO()
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = pytest.main([*arguments, str(ROOT / _TESTS)], [outcomes])
    finally:
        torch.set_num_threads(threads)  # which tests/conftest.py sets to 1
        sys.path.remove(str(ROOT / "tests"))
    output = [] if code == 0 else said.getvalue().splitlines()[-60:]
    return outcomes.counts | {"exit_code": int(code), "output": output}
