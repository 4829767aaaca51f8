"""Make the engine of a policy, and check once that it decodes the model rightly."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from gspo.core.compute import ComputeThread
from gspo.core.errors import ModelError
from gspo.kernels.kv_cache import LAYOUTS, Layout
from gspo.policy.context import probe_length
from gspo.policy.policy import Policy
from gspo.serve.engine import Engine, Request, SamplingParams
from gspo.serve.torch_engine import TorchEngine

log = logging.getLogger("gspo")

_FAILURES = (RuntimeError, AttributeError, TypeError, ValueError, LookupError)
_PROMPT = (1, 2, 3, 4, 5)
_TOKENS = 3
_SLOWER: dict[Layout, str] = {
    "model_cache": "each completion is decoded with a copy of its prompt's keys, which is slower",
    "equal_lengths": "only prompts of equal length are decoded together, which is slower",
}


def make_engine(
    policy: Policy, compute: ComputeThread, *, seed: int = 0, sockets: bool = False
) -> Engine:
    """Make the engine that samples from `policy` in this process, and check it.

    Args:
        policy, compute, seed, sockets: see `TorchEngine`.

    Raises:
        ModelError: see `check_engine`.
    """
    engine = TorchEngine(policy, compute, seed=seed, sockets=sockets)
    check_engine(engine)
    return engine


def check_engine(engine: TorchEngine) -> None:
    """Sample a few tokens and compare their log-probs with a forward pass without a cache.

    One prompt is longer than the model's sliding window, if that costs little. The engine keeps
    the first of `LAYOUTS` that is exact.

    Raises:
        ModelError: the architecture's cache is not one that the engine can decode with.
    """
    source, kind = engine.policy.source, type(engine.policy.lm).__name__
    exact = engine.policy.compute_dtype == engine.policy.lm.dtype == torch.float32
    limit = 1e-2 if exact else 1.0
    reasons = []
    for layout in LAYOUTS[LAYOUTS.index(engine.layout) :]:
        engine.layout = layout
        try:
            gap = _gap(engine)
        except _FAILURES as error:
            reasons.append(f"{layout}: {error}")
            continue
        if gap <= limit:
            if layout != "shared":
                log.info("%s: %s", source, _SLOWER[layout])
            return
        reasons.append(f"{layout}: off by {gap:.3g} nats from the plain forward pass")
    raise ModelError(
        f"{source}: the embedded engine cannot sample from {kind}. What its layers keep from token "
        "to token is neither keys and values nor a state that transformers' cache lets them share "
        f"({'; '.join(reasons)}). Training on rollouts of another server works"
    )


def _gap(engine: TorchEngine) -> float:
    """Return the largest difference between the engine's log-probs and the plain ones."""
    policy = engine.policy
    params = SamplingParams(max_tokens=_TOKENS, seed=0, n=2)
    # Two prompts of different lengths: the shorter one is padded.
    requests = [Request(prompt, params) for prompt in (_PROMPT, _PROMPT[:3])]
    reach = probe_length(policy.lm, policy.context - _TOKENS)
    if reach:  # past the model's sliding window
        prompt = tuple(1 + i % (policy.head.size - 1) for i in range(reach))
        requests.append(Request(prompt, replace(params, n=1)))
    gaps = [torch.zeros(1)]
    for request, done in zip(requests, engine.generate(requests), strict=True):
        for completion in done:
            tokens = torch.tensor([[*request.prompt, *completion.token_ids]], device=policy.device)
            with torch.no_grad(), policy.autocast():
                logits = policy.lm(input_ids=tokens, use_cache=False).logits[0]
                logits = logits[:, : policy.head.size]
            new = tokens[0, len(request.prompt) :]
            expected = logits.float().log_softmax(-1)[len(request.prompt) - 1 : -1]
            expected = expected.gather(-1, new[:, None]).squeeze(-1).cpu()
            gaps.append((torch.tensor(completion.logprobs) - expected).abs())
    return torch.cat(gaps).max().item()  # NaN if there is one
