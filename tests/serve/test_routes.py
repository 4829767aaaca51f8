"""The routes that an engine took: recorded, sent, read back, and equal to the trainer's own."""

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
from gspo.core.errors import DataError, ModelError, RequestError
from gspo.data.expert_choices import decode_routes, encode_routes
from gspo.data.packing import pack
from gspo.data.sample import trajectory_samples
from gspo.policy.expert_tape import as_array
from gspo.policy.policy import Policy
from gspo.serve.app import create_app
from gspo.serve.batcher import Batcher
from gspo.serve.engine import Engine, Request, SamplingParams
from gspo.serve.fake_engine import FakeEngine
from gspo.serve.server import in_process_client
from gspo.serve.torch_engine import TorchEngine
from gspo.train.minibatches import prepare
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer
from policy.routers import phimoe
from policy.test_policy import tiny
from support import choice, embedded, trajectory


@pytest.fixture(scope="module")
def policy() -> Policy:
    return embedded()


def own_routes(policy: Policy, tokens: list[int]) -> np.ndarray:
    """The model's own choice, one plain pass over one sequence."""
    with torch.no_grad(), policy.routing.observe() as tape:
        policy.lm(input_ids=torch.tensor([tokens]))
    return as_array(tape.own(), policy.routing.experts)


def asked(engine: Engine, *texts: str, **params: Any) -> list[Request]:
    prompts = [tuple(engine.encode_chat([{"role": "user", "content": t}])) for t in texts]
    return [Request(p, SamplingParams(max_tokens=12, **params)) for p in prompts]


def test_the_engines_routes_are_the_trainers_own(policy: Policy):
    """Prompts of different lengths (padding), several completions, rows that finish early."""
    engine = TorchEngine(policy)
    requests = asked(engine, "93", "918273645546", "5551", n=5, routes=True, seed=1)
    for request, done in zip(requests, engine.generate(requests), strict=True):
        assert len({len(c.token_ids) for c in done}) > 1 or len(done) == 5
        for completion in done:
            tokens = [*request.prompt, *completion.token_ids]
            assert completion.routes is not None
            assert completion.routes.dtype == np.uint8
            assert completion.routes.nbytes == (len(tokens) - 1) * 2 * 2
            expected = own_routes(policy, tokens)[:-1]
            assert np.array_equal(np.sort(completion.routes), np.sort(expected))


def test_only_those_who_ask_get_routes_and_sampling_is_the_same(policy: Policy):
    engine = TorchEngine(policy)
    plain = asked(engine, "918273", n=2, seed=3)
    watched = asked(engine, "918273", n=2, seed=3, routes=True)
    assert engine.generate(plain) == engine.generate(watched)
    first, second = engine.generate([*plain, *watched])
    assert first == second
    assert all(c.routes is None for c in first)
    assert all(c.routes is not None for c in second)


def test_engines_without_routes_say_so():
    dense = TorchEngine(tiny(LlamaForCausalLM, LlamaConfig))
    request = Request((9, 10), SamplingParams(max_tokens=2, routes=True))
    with pytest.raises(RequestError, match="return_routes asked of a dense model"):
        dense.generate([request])
    with pytest.raises(RequestError, match="FakeEngine has no experts"):
        FakeEngine().generate([request])
    with pytest.raises(ModelError, match="makes 0 top-k choices"):
        TorchEngine(phimoe()).generate([request])


async def test_routes_over_http_become_the_samples_and_train(policy: Policy):
    policy = embedded()
    compute = ComputeThread()
    client = in_process_client(create_app(Batcher(TorchEngine(policy), compute), lambda: ["m"]))
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
        expected = own_routes(policy, sample.tokens.tolist())[:-1]
        assert sample.routes is not None
        assert np.array_equal(np.sort(sample.routes), np.sort(expected))
    options = art.dev.TrainConfig(routing_replay="rollout", minibatches=2)
    metrics = Trainer(policy).train(batch, resolve(options=options)).metrics.compute()
    assert metrics["moe/routing_agreement"] == 1.0
    assert metrics["optim/updates"] == 2


async def test_asking_in_vain_is_a_bad_request_and_spoils_no_other():
    compute = ComputeThread()
    client = in_process_client(create_app(Batcher(FakeEngine(), compute), lambda: ["m"]))
    vain, fine = await asyncio.gather(
        client.completions.create(model="m", prompt="ab", extra_body={"return_routes": True}),
        client.completions.create(model="m", prompt="ab"),
        return_exceptions=True,
    )
    assert isinstance(vain, BadRequestError)
    assert "FakeEngine has no experts" in str(vain)
    assert not isinstance(fine, BaseException)
    await client.close()
    compute.close()


def routes_of(length: int, fill: int) -> np.ndarray:
    return np.full((length, 2, 2), fill, np.uint8)


def test_a_token_keeps_the_route_that_it_was_sampled_with():
    """Turn 1: 3 + 2 tokens, routes of the first 4. Turn 2: 7 + 2 tokens, routes of 8."""
    first = choice([4, 5], [1, 2, 3], routed_experts=encode_routes(routes_of(4, 1)))
    second = choice([8, 9], [1, 2, 3, 4, 5, 6, 7], routed_experts=encode_routes(routes_of(8, 2)))
    (sample,) = trajectory_samples(trajectory(0.0, first, second))
    assert sample.routes is not None
    assert sample.routes[:, 0, 0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
    bare = choice([4, 5], [1, 2, 3])
    (late,) = trajectory_samples(trajectory(0.0, bare, second))
    assert late.routes is not None
    assert late.routes[:, 0, 0].tolist() == [2] * 8
    (none,) = trajectory_samples(trajectory(0.0, bare))
    assert none.routes is None


def test_packed_routes_are_minus_one_where_none_is_known():
    with_routes = choice([4, 5], [1, 2, 3], routed_experts=encode_routes(routes_of(4, 200)))
    samples = [
        *trajectory_samples(trajectory(0.0, choice([4], [1, 2])), trajectory_id=0),
        *trajectory_samples(trajectory(0.0, with_routes), trajectory_id=1),
    ]
    (row,) = pack(samples, 100)
    assert row.routes is not None
    assert row.routes.dtype == torch.int16
    assert row.routes[:, 1, 1].tolist() == [-1, -1, -1, 200, 200, 200, 200, -1]
    (bare,) = pack(samples[:1], 100)
    assert bare.routes is None


@pytest.mark.parametrize("experts", [np.uint8, np.int16])
def test_routes_survive_the_wire(experts: Any):
    routes = np.arange(24).reshape(4, 3, 2).astype(experts)
    decoded = decode_routes(encode_routes(routes), 4, "here")
    assert decoded is not None
    assert decoded.dtype == experts
    assert np.array_equal(decoded, routes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"data": "AAA"}, "damaged"),
        ({"data": "AAAA"}, "damaged"),
        ({"dtype": "float64"}, "dtype 'float64' is not one of"),
        ({"shape": None}, "damaged"),
        ({"shape": [4, 4]}, r"must be \[4, layers, k\]"),
        ({"shape": [2, 2, 4]}, r"must be \[4, layers, k\]"),
    ],
)
def test_damaged_routes_are_named(damage: dict[str, Any], message: str):
    value = encode_routes(routes_of(4, 1)) | damage
    broken = choice([4, 5], [1, 2, 3], routed_experts=value)
    with pytest.raises(DataError, match=f"trajectory 0, choice 0: routed_experts.*{message}"):
        trajectory_samples(trajectory(0.0, broken))
