"""How many tokens a microbatch has on a GPU: as many as its memory has room for.

Two microbatches of random texts are computed, forward and backward; what the larger one takes more
is what a token takes, whatever the architecture, the precision and the attention.
"""

from __future__ import annotations

import numpy as np
import torch

from gspo.data.packing import Microbatch, pack
from gspo.data.sample import sample_of
from gspo.data.turn import Turn
from gspo.policy.policy import Policy

FEWEST, MOST = 256, 32_768
"""Tokens of a microbatch. More than these fill a GPU no better."""
SHARE = 0.8
"""Of the free memory: what is allocated in other sizes than before leaves holes."""
PROBED = (1024, 3072)
_TEXT = 512  # tokens


def microbatch_tokens(policy: Policy) -> int:
    """Tokens that fit, measured at the first call and kept: each step is packed alike."""
    if policy.microbatch_tokens is None:
        # Of several ranks the first one's: it samples, too, so less memory is free there.
        policy.microbatch_tokens = policy.workers.share(_measured(policy))
    return policy.microbatch_tokens


def _measured(policy: Policy) -> int:
    device = policy.device
    try:
        few, many = (_peak(policy, tokens) for tokens in PROBED)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return FEWEST
    each = max(1.0, (many - few) / (PROBED[1] - PROBED[0]))
    fixed = max(0.0, few - each * PROBED[0])
    # Gradients, and the two moments of AdamW, which the first step makes, in float32.
    state = 3 * 4 * sum(p.numel() for p in policy.trainable.values())
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(FEWEST, min(MOST, int((SHARE * (free - state) - fixed) / each)))


def _peak(policy: Policy, tokens: int) -> int:
    """Bytes that a microbatch adds at most, forward and backward. No gradient is kept."""
    microbatch = _random(policy, tokens)
    torch.cuda.reset_peak_memory_stats(policy.device)
    before = torch.cuda.memory_allocated(policy.device)
    with torch.enable_grad():
        logprobs = policy.logprobs(microbatch).logprobs
        weights = list(policy.trainable.values())
        torch.autograd.grad(logprobs.sum(), weights, allow_unused=True)
    return torch.cuda.max_memory_allocated(policy.device) - before


def _random(policy: Policy, tokens: int) -> Microbatch:
    rng = np.random.default_rng(0)
    length = min(_TEXT, policy.context, tokens)
    texts = rng.integers(0, policy.head.size, (tokens // length, length)).tolist()
    turns = [Turn(text[:1], text[1:], [0.0] * (length - 1), 1.0) for text in texts]
    samples = [sample_of([turn], trajectory_id=number) for number, turn in enumerate(turns)]
    (microbatch,) = pack(samples, budget=tokens)
    return microbatch
