"""Decoding is the plain forward pass, and returns the experts that it chose."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from openai import BadRequestError
from transformers import LlamaConfig, LlamaForCausalLM

import gspo as art
from gspo.core.compute import ComputeThread
from gspo.core.errors import ModelError, RequestError
from gspo.policy.load import Policy
from gspo.policy.probe import choose_packing
from gspo.serve.engine import Engine, Request, SamplingParams
from gspo.serve.fake_engine import FakeEngine
from gspo.serve.local_client import in_process_client
from gspo.serve.selfcheck import check_engine
from gspo.serve.torch_engine import TorchEngine
from gspo.serve.verbatim import chat_tokens
from gspo.train.minibatches import prepare
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer
from policy.routers import MOE, phimoe
from policy.test_policy import ARCHITECTURES, tiny
from support import app_of, embedded, trajectory


@pytest.fixture(scope="module")
def policy() -> Policy:
    return embedded()


def own_choices(policy: Policy, tokens: list[int]) -> np.ndarray:
    """The model's own choice, one plain pass over one sequence."""
    with torch.no_grad(), policy.routers.watch() as choices:
        policy.lm(input_ids=torch.tensor([tokens]))
    return choices.preferred().numpy()


def asked(engine: Engine, *texts: str, **params: Any) -> list[Request]:
    prompts = [tuple(chat_tokens(engine, [{"role": "user", "content": t}])) for t in texts]
    return [Request(p, SamplingParams(max_tokens=12, **params)) for p in prompts]


def test_the_engines_choices_are_the_trainers_own(policy: Policy):
    """Prompts of different lengths (padding), several completions, rows that finish early."""
    engine = TorchEngine(policy)
    requests = asked(engine, "93", "918273645546", "5551", n=5, expert_choices=True, seed=1)
    for request, done in zip(requests, engine.generate(requests), strict=True):
        assert len({len(c.token_ids) for c in done}) > 1 or len(done) == 5
        for completion in done:
            tokens = [*request.prompt, *completion.token_ids]
            assert completion.expert_choices is not None
            assert completion.expert_choices.dtype == np.uint8
            assert completion.expert_choices.nbytes == (len(tokens) - 1) * 2 * 2
            expected = own_choices(policy, tokens)[:-1]
            assert np.array_equal(np.sort(completion.expert_choices), np.sort(expected))


def test_only_those_who_ask_get_them_and_sampling_is_the_same(policy: Policy):
    engine = TorchEngine(policy)
    plain = asked(engine, "918273", n=2, seed=3)
    watched = asked(engine, "918273", n=2, seed=3, expert_choices=True)
    assert engine.generate(plain) == engine.generate(watched)
    first, second = engine.generate([*plain, *watched])
    assert first == second
    assert all(c.expert_choices is None for c in first)
    assert all(c.expert_choices is not None for c in second)


def test_engines_without_experts_say_so():
    dense = TorchEngine(tiny(LlamaForCausalLM, LlamaConfig))
    request = Request((9, 10), SamplingParams(max_tokens=2, expert_choices=True))
    with pytest.raises(RequestError, match="return_routes asked of a dense model"):
        dense.generate([request])
    with pytest.raises(RequestError, match="FakeEngine has no experts"):
        FakeEngine().check(request)
    with pytest.raises(ModelError, match="makes 0 top-k choices"):
        TorchEngine(phimoe()).generate([request])


async def test_choices_over_http_become_the_samples_and_train(policy: Policy):
    policy = embedded()
    compute = ComputeThread()
    client = in_process_client(app_of(TorchEngine(policy, compute)))
    groups = []
    for text in ("918273645546", "192837465501"):
        messages: Any = [{"role": "user", "content": text}]
        response = await client.chat.completions.create(
            model="m", messages=messages, n=4, max_tokens=14, extra_body={"return_routes": True}
        )
        groups.append(
            art.TrajectoryGroup(
                trajectory(float(i), choice) for i, choice in enumerate(response.choices)
            )
        )
    plain: Any = await client.chat.completions.create(model="m", messages=messages, max_tokens=2)
    assert not hasattr(plain.choices[0], "routed_experts")
    await client.close()
    compute.close()
    batch = prepare(groups, context=512)
    for (sample,) in batch.samples:
        expected = own_choices(policy, sample.tokens.tolist())[:-1]
        assert sample.expert_choices is not None
        assert np.array_equal(np.sort(sample.expert_choices), np.sort(expected))
    options = art.dev.TrainConfig(routing_replay="rollout", minibatches=2)
    metrics = Trainer(policy).train(batch, resolve(options=options)).metrics.compute()
    assert metrics["moe/routing_agreement"] == 1.0
    assert metrics["optim/updates"] == 2


async def test_asking_in_vain_is_a_bad_request_and_spoils_no_other():
    client = in_process_client(app_of(FakeEngine()))
    vain, fine = await asyncio.gather(
        client.completions.create(model="m", prompt="ab", extra_body={"return_routes": True}),
        client.completions.create(model="m", prompt="ab"),
        return_exceptions=True,
    )
    assert isinstance(vain, BadRequestError)
    assert "FakeEngine has no experts" in str(vain)
    assert not isinstance(fine, BaseException)
    await client.close()


KINDS = {name: entry[:3] for name, entry in ARCHITECTURES.items()} | MOE


def plain(policy: Policy, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        logits = policy.lm(torch.tensor([[*prompt, *tokens]])).logits[0].float().log_softmax(-1)
    at = torch.arange(len(prompt), len(prompt) + len(tokens))
    return logits[at - 1, torch.tensor(tokens)]


@pytest.mark.parametrize("max_running", [512, 3])
@pytest.mark.parametrize("name", KINDS)
def test_decoding_is_the_plain_forward_pass(name: str, max_running: int):
    """Prompts of four lengths, several completions each; some end, some join."""
    model_class, config_class, extra = KINDS[name]
    policy = tiny(model_class, config_class, **extra)
    choose_packing(policy)
    engine = TorchEngine(policy, max_running=max_running)
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
