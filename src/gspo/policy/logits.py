"""What a model does with its logits between output head and loss: a constant factor, a soft cap.

Granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`, Falcon-H1 by
`lm_head_multiplier`, Gemma 2 caps. The cap is known by its name; the factor is found by comparing
the head's plain product with the model's logits, whatever its name is.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from gspo.kernels.hf import backbone

_TOKENS = 5
_TOLERANCE = 1e-5  # of the largest logit; two numbers of a config are further apart


def soft_cap(lm: PreTrainedModel) -> float | None:
    """Find c, if the model's logits are c * tanh(logits / c); None otherwise."""
    config = lm.config.get_text_config()
    names = ("final_logit_softcapping", "logits_soft_cap")
    return next((cap for name in names if (cap := getattr(config, name, None))), None)


@torch.no_grad()
def logit_scale(lm: PreTrainedModel) -> float:
    """Find the factor between the head's product and the logits: a number of the config, or 1 / it.

    It is exactly that number, not a measured one, so that it is the same whatever the weights are.
    If no number fits, it is 1, and `choose_packing` refuses the model.
    """
    head, cap = lm.get_output_embeddings(), soft_cap(lm)
    if not isinstance(head, torch.nn.Linear):
        return 1.0  # `Policy.head` refuses it
    call = {"input_ids": torch.arange(_TOKENS, device=lm.device)[None], "use_cache": False}
    logits = lm.eval()(**call).logits.float()
    plain = head(backbone(lm)(**call).last_hidden_state).float()
    numbers = [v for v in vars(lm.config.get_text_config()).values() if type(v) in (int, float)]
    for scale in (1.0, *numbers, *(1 / number for number in numbers if number)):
        expected = plain * scale
        if cap is not None:
            expected = cap * (expected / cap).tanh()
        room = _TOLERANCE * logits.abs().max().item()
        if plain.shape == logits.shape and torch.allclose(expected, logits, rtol=0, atol=room):
            return float(scale)
    return 1.0
