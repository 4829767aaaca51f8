"""A publication is proved before anything is sampled with it; see faults.py."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import gspo as art
from gspo import dev
from gspo.core.errors import ServeError
from gspo.policy.policy import Policy
from gspo.serve.engine import Request, SamplingParams
from gspo.serve.torch_engine import TorchEngine
from gspo.weights.publisher import publisher_for
from gspo.weights.receipt import Receipts, probe_for
from policy.routers import MOE, moe, phimoe
from support import embedded, random_groups
from weights import rare_faults
from weights.faults import FAULTS, Fault, Street, dense, stale, update
from weights.rare_faults import MODELS, OF_NO_TENSOR

DTYPES: tuple[dev.RolloutDtype, ...] = get_args(dev.RolloutDtype)
ASKED = [Request((1, 2, 3), SamplingParams(max_tokens=1))]
CASES = [(model, name) for model, faults in FAULTS.items() for name in faults]
RARE = [(model, name) for model, faults in rare_faults.FAULTS.items() for name in faults]
ONE_EACH = list({name: (model, name) for model, name in RARE}.values())
"""Each of the rare faults, on the last model that it is of."""


def fault_of(model: str, name: str) -> Fault:
    return (rare_faults.FAULTS[model] | FAULTS.get(model, {}))[name]


def refused(policy: Policy, fault: Fault, dtype: dev.RolloutDtype, seed: int) -> str:
    """Inject a fault into the third publication; returns what the engine answers then."""
    street = Street(policy, dtype, seed)
    street.publish()
    street.publish()
    with pytest.raises(ServeError) as error:
        street.publish(fault)
    with pytest.raises(ServeError) as answer:
        street.engine.generate(ASKED)
    assert str(answer.value) == str(error.value)
    return str(error.value)


def dtypes_of(name: str) -> tuple[dev.RolloutDtype, ...]:
    """Where no tensor differs, what is computed otherwise may lie within a rounded copy's noise."""
    return DTYPES[:1] if name in OF_NO_TENSOR else DTYPES


@pytest.mark.parametrize(("model", "name"), [*CASES, *ONE_EACH])
def test_a_fault_is_caught_before_the_first_token(model: str, name: str):
    policy = MODELS[model]()
    dtype = random.Random(f"{model}/{name}").choice(dtypes_of(name))  # the slow test has each
    message = refused(policy, fault_of(model, name), dtype, 0)
    assert "has no receipt for version" in message
    assert any(said in message for said in ("off by", "only one side has it", "torch."))


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a machine with a load of 50 takes more than the usual ten minutes
@pytest.mark.parametrize(("model", "name"), [*CASES, *RARE])
def test_a_fault_is_caught_each_of_fifty_times(model: str, name: str):
    policy, dtypes = MODELS[model](), dtypes_of(name)
    by_scores = 0
    for seed in range(50):
        message = refused(policy, fault_of(model, name), dtypes[seed % len(dtypes)], 100 + seed)
        by_scores += "its log-probs of the probe" in message or "cannot score" in message
    print(f"{model}, {name}: {by_scores} of 50 by the scores")


@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize("model", FAULTS)
def test_honest_publications_raise_no_alarm(model: str, dtype: dev.RolloutDtype | None):
    publish_honestly(model, dtype, 3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize("model", FAULTS)
def test_a_thousand_honest_publications_raise_no_alarm(model: str, dtype: dev.RolloutDtype | None):
    publish_honestly(model, dtype, 1000)


def publish_honestly(model: str, dtype: dev.RolloutDtype | None, count: int) -> None:
    policy, rng = MODELS[model](), random.Random(7)
    sampling, publisher = publisher_for(policy, dtype)
    engine, receipts = TorchEngine(sampling), Receipts(policy, sampling, publisher)
    receipts.prove(engine, policy.version)
    engine.receipts = receipts
    for number in range(count):
        update(policy, rng, size=rng.choice([1e-6, 1e-3, 0.03]))
        assert receipts.publish(engine)["publish/probe_max_diff"] == 0
        assert engine.policy_version == policy.version
        if number % 100 == 0:
            (done,) = engine.generate(ASKED)
            assert done[0].policy_versions[-1] == policy.version


def test_weights_that_are_not_finite_are_no_fault_of_the_publication():
    street = Street(dense(), "bfloat16")
    with torch.no_grad():
        next(iter(street.policy.trainable.values())).fill_(torch.nan)
    assert street.publish()["publish/probe_max_diff"] == 0


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_another_attention_of_the_engine_is_seen(dtype: dev.RolloutDtype):
    """It would decode otherwise than it scores: by 7 nats, when this was found."""
    street = Street(dense(), dtype)
    street.publish()
    street.engine.policy.lm.set_attn_implementation("sdpa")
    with pytest.raises(ServeError, match="its attention is 'sdpa', not 'gspo_packed'"):
        street.publish()


def test_an_honest_publication_after_a_fault_is_proved():
    street = Street(dense(), "float32")
    with pytest.raises(ServeError, match=r"version 1 .*: tensors that are not the .* \(off by"):
        street.publish(stale)
    assert street.engine.policy_version == 0
    street.publish()
    (done,) = street.engine.generate(ASKED)
    assert done[0].policy_versions[-1] == street.engine.policy_version == 2


def test_a_publication_that_fails_half_way_leaves_no_receipt():
    street = Street(dense(), "float32")

    def fails(on: Any) -> None:
        raise OSError("no space")

    with pytest.raises(OSError):
        street.publish(fails)
    with pytest.raises(ServeError, match=r"version 1 .*did not end"):
        street.engine.generate(ASKED)


def test_shared_weights_are_not_sampled_before_their_receipt():
    """The trainer has moved them; nobody has published yet."""
    policy = dense()
    sampling, publisher = publisher_for(policy, None)
    engine, receipts = TorchEngine(sampling), Receipts(policy, sampling, publisher)
    engine.receipts = receipts
    with pytest.raises(ServeError, match=r"version 0 .*not proved yet"):
        engine.generate(ASKED)
    receipts.prove(engine, policy.version)
    assert engine.generate(ASKED)[0][0].policy_versions[-1] == 0
    update(policy, random.Random(0))
    assert engine.policy_version == 0
    with pytest.raises(ServeError, match=r"version 1 .*last receipt is for version 0"):
        engine.generate(ASKED)
    receipts.publish(engine)
    assert engine.generate(ASKED)[0][0].policy_versions[-1] == 1


def test_an_engine_with_a_model_of_its_own_is_no_shared_memory():
    policy = dense()
    _, publisher = publisher_for(policy, None)
    engine = TorchEngine(dense())  # the same weights, as long as the trainer's don't move
    receipts = Receipts(policy, policy, publisher)
    receipts.prove(engine, policy.version)
    update(policy, random.Random(0), size=1e-5)
    with pytest.raises(ServeError, match=r"off by .* nats \(0 allowed\)"):
        receipts.publish(engine)


def test_a_merge_that_leaves_the_adapters_out_is_seen(monkeypatch: pytest.MonkeyPatch):
    """A fault that publication and comparison share."""
    policy = MODELS["lora"]()
    layers = [m for m in policy.lm.modules() if hasattr(m, "get_delta_weight")]
    kinds: set[Any] = {type(layer) for layer in layers}
    for kind in kinds:  # a forward pass has its own product
        whole = kind.get_delta_weight
        monkeypatch.setattr(kind, "get_delta_weight", lambda *a, real=whole: 0 * real(*a))
    sampling, publisher = publisher_for(policy, "int8")
    receipts = Receipts(policy, sampling, publisher)
    with pytest.raises(ServeError, match="merging the LoRA adapters moves log-probs"):
        receipts.prove(TorchEngine(sampling), policy.version)


@pytest.mark.parametrize("name", MOE)
def test_each_expert_of_each_layer_computes_a_token_with_a_score(name: str):
    policy = moe(name)
    choices = probe_for(policy).expert_choices
    assert choices is not None
    for layer in choices[:-1].unbind(1):
        assert set(layer.flatten().tolist()) == set(range(policy.routers.experts))
        assert all(len(set(token)) == len(token) for token in layer.tolist())


def test_routers_that_cannot_be_replayed_choose_for_themselves():
    assert probe_for(phimoe()).expert_choices is None


def test_every_weight_moves_the_score_of_the_probe():
    """Of one engine whose tensors nobody can see: all weights but rows of the embedding."""
    for policy in (MODELS["moe"](), MODELS["dense"](), embedded()):
        engine, probe = TorchEngine(policy), probe_for(policy)
        before = engine.score(probe)
        for name, parameter in policy.lm.named_parameters():
            by_expert = parameter.dim() == 3 or "mlp.gate." in name
            for part in parameter.unbind(0) if by_expert else [parameter]:
                kept = part.detach().clone()
                with torch.no_grad():
                    part.mul_(1.01)
                    assert engine.score(probe) != before, name
                    part.copy_(kept)
        assert engine.score(probe) == before


async def test_a_step_whose_publication_is_wrong_is_refused(tmp_path: Path):
    model = art.TrainableModel(
        name="m",
        project="p",
        base_model="embedded:sort",
        _internal_config=dev.InternalModelConfig(rollout_dtype="bfloat16"),
    )
    async with art.LocalBackend(tmp_path) as backend:
        await model.register(backend)
        receipts: Any = backend._service(model).engine.receipts
        publisher: Any = receipts._publisher
        honest = publisher.publish

        def wrong(policy: Any) -> int:
            version = honest(policy)
            with torch.no_grad():
                publisher.policy.lm.get_parameter("model.norm.weight")[3] = 0
            return version

        publisher.publish = wrong
        groups = random_groups(backend.policy(model))
        with pytest.raises(ServeError, match=r"TorchEngine .* version 1 .*model\.norm\.weight"):
            await backend.train(model, groups, learning_rate=1e-3)
        with pytest.raises(Exception, match="no receipt for version 1"):
            await model.openai_client().completions.create(model="m", prompt="31")
        publisher.publish = honest  # pyright: ignore[reportAttributeAccessIssue]
        metrics = (await backend.train(model, groups, learning_rate=1e-3)).metrics
        assert metrics["publish/probe_max_diff"] == 0
        assert 0 < metrics["time/receipt"] < metrics["time/publish"]
        await model.openai_client().completions.create(model="m", prompt="31")
