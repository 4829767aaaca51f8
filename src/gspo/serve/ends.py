"""Tokens that end a completion: the model's, and those that a request names."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gspo.core.errors import RequestError
from gspo.policy.policy import Policy
from gspo.serve.engine import SamplingParams


def end_tokens(policy: Policy) -> Bool[Tensor, " V"]:
    """True at the end tokens that the model's generation config and its tokenizer name."""
    config = getattr(policy.lm, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    ids = set(named if isinstance(named, list) else [named])
    ids.add(policy.tokenizer.eos_token_id)
    ends = torch.zeros(policy.head.size, dtype=torch.bool, device=policy.device)
    ends[[i for i in ids if i is not None and i < len(ends)]] = True
    return ends


def ends_of(
    params: SamplingParams, tokenizer: PreTrainedTokenizerBase, size: int
) -> frozenset[int]:
    """Tokens that end a completion of this request: its `stop_token_ids`, and each stop text that
    is one token which the completion's text leaves out, such as `<|im_end|>`.

    Raises:
        RequestError: a token that the model doesn't have; or a stop text that can never be found,
            because a part of it is a token that the text leaves out.
    """
    for token in params.stop_token_ids:
        if not 0 <= token < size:
            raise RequestError(
                f"stop_token_ids: {token} is not among the model's {size} tokens",
                param="stop_token_ids",
            )
    ends = set(params.stop_token_ids)
    for text in params.stop if params.skip_special_tokens else ():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        hidden = [
            token
            for token in ids
            if token != tokenizer.unk_token_id
            and not tokenizer.decode([token], skip_special_tokens=True)
            and tokenizer.decode([token], skip_special_tokens=False)
        ]
        if hidden and len(ids) == 1:
            ends |= {token for token in hidden if token < size}
        elif hidden:
            name = tokenizer.decode([hidden[0]], skip_special_tokens=False)
            raise RequestError(
                f"stop = {text!r} has the special token {name!r} in it, which the text of a "
                f"completion leaves out: give {name!r} alone, or skip_special_tokens=false",
                param="stop",
            )
    return frozenset(ends)
