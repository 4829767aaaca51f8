"""Does the engine decode this model rightly? Asked once, before anyone relies on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gspo.errors import ModelError
from gspo.policy.load import Policy, autocast
from gspo.serve.engine import Completion, Request, SamplingParams
from gspo.serve.torch_engine import TorchEngine

_PROMPT = (1, 2, 3, 4, 5)
_TOKENS = 2


def check_engine(engine: TorchEngine) -> None:
    """Sample two tokens and compare their log-probs with a forward pass without a cache.

    Raises:
        ModelError: the architecture's cache is not one that the engine can decode with.
    """
    policy = engine.policy
    params = SamplingParams(max_tokens=_TOKENS, seed=0, n=2)
    try:
        done = engine.generate([Request(_PROMPT, params)])[0]
        gap = _gap(policy, [c for c in done if len(c.token_ids) == _TOKENS])
    except (RuntimeError, AttributeError, TypeError, ValueError, LookupError) as error:
        raise ModelError(
            f"{policy.source}: the embedded engine cannot decode "
            f"{type(policy.lm).__name__}: {error}"
        ) from error
    exact = policy.compute_dtype == policy.lm.dtype == torch.float32
    if not gap <= (1e-2 if exact else 1.0):
        raise ModelError(
            f"{policy.source}: decoding {type(policy.lm).__name__} with a cache is off by "
            f"{gap:.3g} nats from its plain forward pass"
        )


def _gap(policy: Policy, done: Sequence[Completion]) -> float:
    """Largest difference between the engine's log-probs and the plain ones."""
    if not done:  # every completion ended at once
        return 0.0
    tokens = torch.tensor([(*_PROMPT, *c.token_ids) for c in done], device=policy.device)
    with torch.no_grad(), autocast(policy):
        logits = policy.lm(input_ids=tokens, use_cache=False).logits
    expected = logits.float().log_softmax(-1)[:, -_TOKENS - 1 : -1]
    expected = expected.gather(-1, tokens[:, -_TOKENS:, None]).squeeze(-1).cpu()
    got = torch.tensor([c.logprobs for c in done])
    return (got - expected).abs().max().item()
