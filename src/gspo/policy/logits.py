"""What a model does with its logits between output head and loss: a constant factor, a soft cap.

Granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`, Falcon-H1 by
`lm_head_multiplier`, Gemma 2 caps. The cap is known by its name; the factor is found by comparing
the head's plain product with the model's logits, whatever its name is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from gspo.core.errors import ModelError

_TOKENS = 5
_TOLERANCE = 1e-5  # of the largest logit; two numbers of a config are further apart


def soft_cap(lm: PreTrainedModel) -> float | None:
    """Find c, if the model's logits are c * tanh(logits / c); None otherwise."""
    config = lm.config.get_text_config()
    names = ("final_logit_softcapping", "logits_soft_cap")
    return next((cap for name in names if (cap := getattr(config, name, None))), None)


def logit_scale(lm: PreTrainedModel, source: str) -> float:
    """Find the factor between the head's product and the logits: a number of the config, or 1 / it.

    It is exactly that number, not a measured one, so that it is the same whatever the weights are.

    Raises:
        ModelError: no number in the config turns the head's output into the logits.
    """
    head, cap = lm.get_output_embeddings(), soft_cap(lm)
    if not isinstance(head, torch.nn.Linear):
        return 1.0  # `Policy.head` refuses it
    products: list[Any] = []
    hook = head.register_forward_hook(lambda *call: products.append(call[-1]))
    tokens = torch.arange(1, _TOKENS + 1, device=lm.device)[None] % head.weight.shape[0]
    try:
        with torch.no_grad():
            logits = lm.eval()(input_ids=tokens, use_cache=False).logits.float()
    finally:
        hook.remove()
    if len(products) != 1 or products[0].shape != logits.shape:
        return 1.0  # no plain head: the probe of the log-probs finds out what else happens
    plain = products[0].float().clone()
    for scale in _candidates(lm):
        expected = plain * scale
        if cap is not None:
            expected = cap * (expected / cap).tanh()
        if (expected - logits).abs().max() <= _TOLERANCE * logits.abs().max():
            return scale
    raise ModelError(
        f"{source}: {type(lm).__name__} changes its logits after the output head by something "
        "else than a constant factor or a soft cap of its config; gspo cannot compute its "
        "log-probs, so the architecture is not supported"
    )


def _candidates(lm: PreTrainedModel) -> Iterator[float]:
    """Yield 1, then each number of the config and its inverse."""
    yield 1.0
    for value in vars(lm.config.get_text_config()).values():
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            yield float(value)
            yield 1.0 / value
