"""Decoding is each architecture's plain forward pass: sliding windows, sinks, latent attention."""

from __future__ import annotations

import pytest
import torch

from gspo.policy.policy import Policy
from gspo.policy.probe import choose_packing
from gspo.serve.engine import Request, SamplingParams
from gspo.serve.selfcheck import check_engine
from gspo.serve.torch_engine import TorchEngine
from policy.routers import MOE
from policy.test_policy import ARCHITECTURES, tiny

KINDS = {name: entry[:3] for name, entry in ARCHITECTURES.items()} | MOE


def plain(policy: Policy, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        logits = policy.lm(torch.tensor([[*prompt, *tokens]])).logits[0].float().log_softmax(-1)
    at = torch.arange(len(prompt), len(prompt) + len(tokens))
    return logits[at - 1, torch.tensor(tokens)]


@pytest.mark.parametrize("max_rows", [512, 3])
@pytest.mark.parametrize("name", KINDS)
def test_decoding_is_the_plain_forward_pass(name: str, max_rows: int):
    """Prompts of four lengths, several completions each, rows that end and rows that join."""
    model_class, config_class, extra = KINDS[name]
    policy = tiny(model_class, config_class, **extra)
    choose_packing(policy)
    engine = TorchEngine(policy, max_rows=max_rows)
    check_engine(engine)
    asked = [
        Request(
            tuple(range(9, 9 + width)),
            SamplingParams(n=2, max_tokens=length, seed=width, ignore_eos=True),
        )
        for width, length in ((3, 12), (11, 4), (1, 9), (7, 17))
    ]
    for request, done in zip(asked, engine.generate(asked), strict=True):
        for completion in done:
            assert len(completion.token_ids) == request.params.max_tokens
            expected = plain(policy, request.prompt, completion.token_ids)
            got = torch.tensor(completion.logprobs)
            torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
