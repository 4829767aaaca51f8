"""Which way of decoding each kind of layer gets, and that it is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from gspo.core.errors import ModelError
from gspo.policy.load import load_policy
from gspo.policy.probe import choose_packing
from gspo.serve.engine import Request, SamplingParams
from gspo.serve.selfcheck import check_engine
from gspo.serve.torch_engine import TorchEngine
from models import folder, plain, text

LAYOUTS = {
    "llama": "shared",
    "granite": "shared",
    "windows": "shared",
    "gemma2": "model_cache",
    "llama4": "model_cache",
    "qwen3_next": "model_cache",
    "qwen3_5": "model_cache",
    "lfm2": "model_cache",
    "jamba": "model_cache",
    "bamba": "model_cache",
    "falcon_h1": "model_cache",
    "mamba2": "model_cache",
    "minimax": "model_cache",
    "mamba": "equal_lengths",
}


def kinds() -> list[Any]:
    """Those that transformers' release can decode by a cache at all."""
    new = pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.24"),
        reason="Mamba's cache of transformers before 5.24 is refused",
    )
    return [pytest.param(kind, marks=[new] * kind.startswith("mamba")) for kind in LAYOUTS]


@pytest.mark.parametrize("kind", kinds())
def test_every_token_is_the_plain_forward_pass(kind: str, tmp_path: Path):
    """Prompts of three lengths, rows that end at different times, one prompt past the windows."""
    policy = load_policy(folder(tmp_path, kind))
    choose_packing(policy)
    engine = TorchEngine(policy)
    check_engine(engine)
    assert engine.layout == LAYOUTS[kind]
    asked = [
        Request(
            tuple(text(width, width).tolist()),
            SamplingParams(n=2, max_tokens=length, seed=width, ignore_eos=True),
        )
        for width, length in ((5, 12), (45, 6), (9, 20), (5, 3))
    ]
    for request, done in zip(asked, engine.generate(asked), strict=True):
        for completion in done:
            tokens = torch.tensor([*request.prompt, *completion.token_ids]).numpy()
            expected = plain(policy, tokens, len(request.prompt))
            got = torch.tensor(completion.logprobs)
            torch.testing.assert_close(got, expected, atol=5e-4, rtol=0)


def test_a_state_inside_the_modules_is_refused_in_words(tmp_path: Path):
    policy = load_policy(folder(tmp_path, "recurrent_gemma"))
    choose_packing(policy)
    with pytest.raises(
        ModelError, match=r"cannot sample from RecurrentGemma.*another server works"
    ):
        check_engine(TorchEngine(policy))


def test_routes_of_a_model_with_its_own_cache(tmp_path: Path):
    policy = load_policy(folder(tmp_path, "qwen3_next"))
    choose_packing(policy)
    engine = TorchEngine(policy)
    check_engine(engine)
    params = SamplingParams(n=2, max_tokens=4, seed=0, expert_choices=True, ignore_eos=True)
    for completion in engine.generate([Request((5, 6, 7), params)])[0]:
        assert completion.expert_choices is not None
        assert completion.expert_choices.shape == (6, 4, 2)
