"""Weights reach the engine through a publisher, whatever engine it is."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import gspo as art
from gspo.backend import engines
from gspo.core.draws import seed_of
from gspo.core.errors import ServeError
from gspo.data.packing import pack
from gspo.policy.load import Policy
from gspo.serve.chat import ChatFormat
from gspo.serve.engine import Completion, Engine, Piece, Request, check_fits
from gspo.serve.fake_engine import FakeTokenizer
from gspo.serve.torch_engine import TorchEngine
from gspo.train.minibatches import prepare
from gspo.weights.publisher import SharedMemory, publisher_for
from gspo.weights.receipt import Probe, Receipts, score
from gspo.weights.rollout_copy import RoundedCopy
from support import embedded


def make(dtype: art.dev.RolloutDtype | None) -> art.TrainableModel:
    return art.TrainableModel(
        name="m",
        project="p",
        base_model="embedded:sort",
        _internal_config=art.dev.InternalModelConfig(rollout_dtype=dtype),
    )


async def gather(model: art.TrainableModel) -> list[art.TrajectoryGroup]:
    async def rollout(text: str) -> art.Trajectory:
        messages = [{"role": "user", "content": text}]
        response = await model.openai_client().chat.completions.create(
            model=model.inference_name,
            messages=messages,  # pyright: ignore[reportArgumentType]
            max_tokens=16,
        )
        answer = response.choices[0]
        right = sum(
            a == b for a, b in zip(answer.message.content or "", sorted(text), strict=False)
        )
        return art.Trajectory(messages_and_choices=[*messages, answer], reward=right / 12)

    return await art.gather_trajectory_groups(
        art.TrajectoryGroup(rollout(text) for _ in range(4))
        for text in ("918273645546", "302010405060")
    )


def gap(policy: Policy, groups: list[art.TrajectoryGroup]) -> float:
    """How far the choices' log-probs are from a policy's, at most."""
    batch = prepare(groups, context=policy.context)
    (packed,) = pack([s for own in batch.samples for s in own], budget=10_000)
    with torch.no_grad():
        return (policy.logprobs(packed).logprobs - packed.old_logprobs).abs().max().item()


async def test_choices_come_from_a_copy_that_follows(tmp_path: Path):
    backend = art.LocalBackend(tmp_path)
    model = make("int4")
    await model.register(backend)
    trainer = backend.policy(model)
    for step in range(3):
        groups = await gather(model)
        versions = {c.policy_version for g in groups for t in g for c in t.choices()}  # pyright: ignore[reportAttributeAccessIssue]
        assert versions == {step}
        assert gap(RoundedCopy(trainer, "int4").policy, groups) < 1e-4
        assert gap(trainer, groups) > 1e-2
        if step == 2:
            break
        result = await backend.train(model, groups, learning_rate=1e-3)
        assert result.metrics["mismatch/log_ratio_abs_max"] > 1e-2
    await backend.close()


async def test_without_it_the_engine_shares_the_weights(tmp_path: Path):
    backend = art.LocalBackend(tmp_path)
    model = make(None)
    await model.register(backend)
    service = backend._service(model)
    assert isinstance(service.engine, TorchEngine)
    assert service.engine.policy is service.trainer.policy
    receipts = service.engine.receipts
    assert receipts is not None and isinstance(receipts._publisher, SharedMemory)
    await backend.close()


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), "int4"])
async def test_a_resumed_run_ends_in_the_same_weights(tmp_path: Path, dtype: art.dev.RolloutDtype):
    async def steps(folder: str, count: int) -> None:
        backend = art.LocalBackend(tmp_path / folder)
        model = make(dtype)
        await model.register(backend)
        for _ in range(count):
            await backend.train(model, await gather(model), learning_rate=1e-3)
        await backend.close()

    await steps("resumed", 1)
    await steps("resumed", 1)
    await steps("whole", 2)
    one, two = (
        tmp_path / name / "p" / "m" / "checkpoints" / "0002" / "model.safetensors"
        for name in ("resumed", "whole")
    )
    assert one.read_bytes() == two.read_bytes()


async def test_a_failed_update_leaves_engine_and_trainer_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    backend = art.LocalBackend(tmp_path)
    model = make("float32")
    await model.register(backend)
    groups = await gather(model)
    trainer, real = backend._service(model).trainer, backend._service(model).trainer.optimizer.step
    calls = []

    def fails_later(*arguments: object) -> float:
        calls.append(arguments)
        if len(calls) == 2:
            raise art.errors.NumericsError("the gradient is not finite")
        return real(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(trainer.optimizer, "step", fails_later)
    with pytest.raises(art.errors.NumericsError):
        await backend.train(model, groups, learning_rate=1e-2, minibatches=1, epochs=2)
    assert gap(backend.policy(model), groups) > 1e-3  # the first epoch moved the weights
    assert gap(backend.policy(model), await gather(model)) < 1e-4
    await backend.close()


class FilePublisher:
    """A second publisher: the weights go to a file, as to an engine in another process."""

    tolerance = 0.0

    def __init__(self, file: Path):
        self.file = file

    def publish(self, policy: Policy) -> int:
        save_file(dict(policy.lm.named_parameters()), self.file, {"version": str(policy.version)})
        return policy.version

    def expected(self, policy: Policy) -> tuple[Policy, dict[str, torch.Tensor]]:
        return policy, {}


class Digits:
    """A tokenizer of digits."""

    most_characters = 64

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return [6 + int(character) for character in text if character.isdigit()]

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        return "".join(str(token - 6) for token in token_ids)

    def token_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        return [self.decode([token]).encode() for token in token_ids]


class FileEngine:
    """A second engine: it draws digits, and knows its version from the file."""

    def __init__(self, file: Path):
        self.file = file
        self.seeds: list[int] = []
        self.chat = ChatFormat(FakeTokenizer())
        self.receipts: Receipts | None = None

    @property
    def policy_version(self) -> int:
        if not self.file.exists():
            return 0
        with safe_open(self.file, "pt") as weights:
            return int(weights.metadata()["version"])

    tokenizer = Digits()
    traffic = (0, 0)

    def check(self, request: Request) -> None:
        check_fits(request, context=64, vocabulary=16)

    def score(self, probe: Probe) -> list[float]:
        policy = embedded()
        if self.file.exists():
            policy.lm.load_state_dict(load_file(self.file), strict=False)  # the head is tied
        return score(policy, probe).tolist()

    async def complete(self, request: Request) -> list[Completion]:
        assert self.receipts is not None
        self.receipts.require(self.policy_version, self)
        return [self._completion(index) for index in range(request.params.n)]

    async def stream(self, request: Request) -> AsyncGenerator[Piece, None]:
        for i, done in enumerate(await self.complete(request)):
            yield Piece(i, done.token_ids, done.logprobs, completion=done)

    def close(self) -> None:
        pass

    def _completion(self, index: int) -> Completion:
        tokens = tuple(6 + (index + i) % 10 for i in range(3))
        logprobs = (-math.log(10),) * 3
        version = self.policy_version
        return Completion(
            tokens, logprobs, self.tokenizer.decode(tokens), "length", (version,) * 3, 1.0
        )

    def reseed(self, seed: int) -> None:
        self.seeds.append(seed)


async def test_another_engine_and_another_publisher_are_new_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The whole street, of which only the two factories change."""
    file = tmp_path / "weights.safetensors"
    engine = FileEngine(file)
    assert isinstance(engine, Engine)
    monkeypatch.setattr(engines, "make_engine", lambda *_, **__: engine)
    second = FilePublisher(file)
    monkeypatch.setattr(engines, "publisher_for", lambda policy, dtype: (policy, second))
    model = make(None)
    async with art.LocalBackend(tmp_path / "runs") as backend:
        await model.register(backend)
        for step in range(2):
            groups = await gather_digits(model)
            versions = {c.policy_version for g in groups for t in g for c in t.choices()}  # pyright: ignore[reportAttributeAccessIssue]
            assert versions == {step}
            assert (await backend.train(model, groups, learning_rate=1e-3)).step == step + 1
            published = load_file(file)
            for name, weight in backend.policy(model).lm.named_parameters():
                assert torch.equal(published[name], weight)
    assert engine.seeds == [seed_of(0, 1), seed_of(0, 2)]


async def gather_digits(model: art.TrainableModel) -> list[art.TrajectoryGroup]:
    """Two groups of four rollouts that differ in their rewards."""
    groups = []
    for text in ("12", "34"):
        messages = [{"role": "user", "content": text}]
        response = await model.openai_client().chat.completions.create(
            model="m",
            messages=messages,  # pyright: ignore[reportArgumentType]
            n=4,
        )
        groups.append(
            art.TrajectoryGroup(
                art.Trajectory(messages_and_choices=[*messages, choice], reward=choice.index)
                for choice in response.choices
            )
        )
    return groups


async def test_an_engine_that_a_publication_does_not_reach_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def publisher_for(policy: Policy, dtype: None) -> tuple[Policy, Lost]:
        return RoundedCopy(policy, "float32").policy, Lost()

    monkeypatch.setattr(engines, "publisher_for", publisher_for)
    model = make(None)
    async with art.LocalBackend(tmp_path) as backend:
        await model.register(backend)
        with pytest.raises(ServeError, match=r"TorchEngine .* version 1 .* off by"):
            await backend.train(model, await gather(model), learning_rate=1e-3)


class Lost:
    """Publishes to nobody."""

    tolerance = 0.0

    def publish(self, policy: Policy) -> int:
        return policy.version

    def expected(self, policy: Policy) -> tuple[Policy, dict[str, torch.Tensor]]:
        return policy, {}


@pytest.mark.parametrize("dtype", [None, "float32", "int8"])
def test_a_publication_is_of_the_trainers_version_and_may_be_repeated(
    dtype: art.dev.RolloutDtype | None,
):
    policy = embedded()
    sampling, publisher = publisher_for(policy, dtype)
    assert (sampling is policy) == (dtype is None)
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.mul_(1.5)
    policy.version = 4
    assert publisher.publish(policy) == sampling.version == 4
    once = {name: weight.clone() for name, weight in sampling.lm.state_dict().items()}
    assert publisher.publish(policy) == 4
    assert all(torch.equal(once[name], w) for name, w in sampling.lm.state_dict().items())
