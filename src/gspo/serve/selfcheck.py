"""Make the engine of a policy, and check once that it decodes the model rightly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gspo.core.compute import ComputeThread
from gspo.core.errors import ModelError
from gspo.core.log import log
from gspo.data.packing import pack
from gspo.data.sample import Sample, sample_of
from gspo.data.turn import Turn
from gspo.kernels.exact import MULTIPLES, Part, measure, undo
from gspo.kernels.kv_cache import LAYOUTS
from gspo.kernels.tile_attention import TILE
from gspo.policy.context import probe_length
from gspo.policy.load import SMALL
from gspo.policy.policy import Policy
from gspo.policy.probe import FAILURES, plain_logprobs
from gspo.serve.engine import Completion, Request, SamplingParams
from gspo.serve.torch_engine import TorchEngine

_TOLERANCE = 1e-2  # nats, in float32


def make_engine(
    policy: Policy,
    compute: ComputeThread,
    *,
    seed: int = 0,
    sockets: bool = False,
    exact: bool | None = False,
) -> TorchEngine:
    """Make the engine that samples from `policy` in this process, and check it.

    Args:
        policy, compute, seed, sockets: see `TorchEngine`.
        exact: make its log-probs equal to those of training, to the bit; None: if that can be.

    Raises:
        ModelError: see `check_engine` and `make_exact`.
    """
    engine = TorchEngine(policy, compute, seed=seed, sockets=sockets)
    check_engine(engine)
    if exact or exact is None:
        make_exact(engine, required=exact is True)
    return engine


def make_exact(engine: TorchEngine, *, required: bool) -> None:
    """Set `policy.exact`, and what it takes, if engine and trainer can be equal to the bit.

    Raises:
        ModelError: it is required and cannot be; the error says why.
    """
    _, reason = measure_exactness(engine)
    source = engine.policy.source
    if reason is None:
        log.info("%s: engine and trainer are equal to the bit", source)
        return
    engine.policy.not_exact = reason
    if required:
        raise ModelError(
            f"{source}: exact=True, but {reason}. `gspo audit MODEL --exact` shows each part; "
            "leave exact out to train with a difference of rounding"
        )
    log.info("%s: engine and trainer are not equal to the bit: %s", source, reason)


def measure_exactness(engine: TorchEngine) -> tuple[list[Part], str | None]:
    """Make engine and trainer equal to the bit, if that can be; `policy.exact` says so.

    The modules are measured first; then completions of the engine, decoded beside many others and
    beside few, are scored as training scores them. Only if each log-prob is the same is it exact.

    Returns:
        The parts of the model, and why it is not exact (None: it is).
    """
    policy = engine.policy
    parts, reason = list[Part](), _obstacle(engine)
    try:
        if reason is None:
            parts = measure(policy.lm, policy.head)
            reason = _fault(engine, parts)
    except FAILURES as error:
        reason = f"measuring it fails: {error}"
    policy.exact = reason is None
    if not policy.exact:
        policy.multiple = 1
        undo(policy.lm)
    return parts, reason


def _fault(engine: TorchEngine, parts: list[Part]) -> str | None:
    """Find the multiple of tokens with which the engine is exact; or say why there is none."""
    policy = engine.policy
    worst = max(parts, key=lambda part: part.multiple or 2**31)
    needed, gap = worst.multiple, float("inf")
    if needed is None or needed > MULTIPLES[-1]:
        return (
            f"{worst.kind} ({worst.name}) computes a row differently beside other rows, at any "
            "number of them"
        )
    for policy.multiple in (m for m in MULTIPLES if m >= needed):
        gap = _inexact(engine)
        if gap == 0:
            return None
    return f"its log-probs still differ by {gap:.3g} nats from those of training"


def _obstacle(engine: TorchEngine) -> str | None:
    """Say what rules exactness out before anything is measured."""
    policy = engine.policy
    if policy.device.type != "cpu":
        return f"on device {policy.device.type!r} sums depend on the batch: give device='cpu'"
    if torch.get_num_threads() > 2:
        return (
            f"with {torch.get_num_threads()} threads torch cuts tensors at places that gspo does "
            "not know: InternalModelConfig(threads=2) or threads=1"
        )
    if policy.packing != "tiles" or engine.layout != "shared":
        return (
            f"{type(policy.lm).__name__} is not computed by gspo's attention, once in each layer "
            f"(samples are packed by {policy.packing!r} and decoded by {engine.layout!r})"
        )
    return None


def _inexact(engine: TorchEngine) -> float:
    """Return the largest difference between sampled and scored log-probs; 0: all bits are equal."""
    policy = engine.policy
    small = sum(p.numel() for p in policy.lm.parameters()) < SMALL
    tokens = 8 if small else 4
    lengths = (1, TILE - 1, TILE, TILE + 1, 2 * TILE + 1) if small else (2, TILE + 1)
    requests = [*_requests(policy, lengths, tokens, windows=small)]
    running, answers, differences = engine.max_running, None, list[Tensor]()
    try:
        for engine.max_running in (running, 3):
            before, answers = answers, engine.generate(requests)
            if answers != before:  # else they were scored
                differences += _differences(policy, _samples(requests, answers))
    finally:
        engine.max_running = running
    return torch.cat(differences).abs().max().item()  # NaN if there is one


def _requests(
    policy: Policy, lengths: Sequence[int], tokens: int, *, windows: bool = True
) -> Iterator[Request]:
    """Ask for two completions of prompts that begin alike, of these lengths; and, with `windows`,
    of one that is longer than the model's sliding window, if that costs little."""
    longest = policy.context - tokens
    reach = probe_length(policy.lm, longest) if windows else 0
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(policy.head.size, (max(reach, *lengths),), generator=generator).tolist()
    for length in (*lengths, *([reach] if reach else [])):
        length = max(1, min(length, longest))
        prompt = (*text[: length // 2], *text[-(length - length // 2) :])
        params = SamplingParams(n=2, max_tokens=tokens, seed=length, ignore_eos=True)
        yield Request(prompt, params)


def _samples(requests: Sequence[Request], answers: Sequence[Sequence[Completion]]) -> list[Sample]:
    """What was sampled, each completion a sample."""
    return [
        sample_of([Turn([*request.prompt], [*c.token_ids], [*c.logprobs])], 0, number)
        for request, completions in zip(requests, answers, strict=True)
        for number, c in enumerate(completions)
    ]


def _differences(policy: Policy, samples: Sequence[Sample]) -> Iterator[Tensor]:
    """Score samples as training does, together and one by one."""
    for budget, share in ((10**6, policy.shares_prompts), (1, False)):
        for microbatch in pack(samples, budget, share=share):
            yield policy.logprobs(microbatch).logprobs.detach() - microbatch.sampling_logprobs


def check_engine(engine: TorchEngine) -> None:
    """Sample a few tokens and compare their log-probs with a forward pass without a cache.

    One prompt is longer than the model's sliding window, if that costs little. The engine keeps
    the first of `LAYOUTS` that is exact.

    Raises:
        ModelError: the architecture's cache is not one that the engine can decode with.
    """
    source, kind = engine.policy.source, type(engine.policy.lm).__name__
    reasons = []
    for layout in LAYOUTS[LAYOUTS.index(engine.layout) :]:
        engine.layout = layout
        try:
            with engine.policy.in_float32():
                gap = _gap(engine)
            if engine.policy.lm.dtype != torch.float32:
                _gap(engine)  # it must compute; how far rounding takes it is no fault
        except FAILURES as error:
            reasons.append(f"{layout}: {error}")
            continue
        if gap <= _TOLERANCE:
            if layout != "shared":
                log.info("%s: decoded by %r, which is slower than 'shared'", source, layout)
            return
        reasons.append(f"{layout}: off by {gap:.3g} nats from the plain forward pass")
    raise ModelError(
        f"{source}: the embedded engine cannot sample from {kind}. What its layers keep from token "
        "to token is neither keys and values nor a state that transformers' cache lets them share "
        f"({'; '.join(reasons)}). Training on rollouts of another server works"
    )


def _gap(engine: TorchEngine) -> float:
    """Return the largest difference between the engine's log-probs and the plain ones."""
    requests = [*_requests(engine.policy, (5, 3), 3)]  # the shorter one is padded
    samples = _samples(requests, engine.generate(requests))
    sampled = torch.cat([torch.from_numpy(s.old_logprobs[s.ratio_mask]) for s in samples])
    gaps = sampled - plain_logprobs(engine.policy, samples).cpu()
    return gaps.abs().max().item()  # NaN if there is one
