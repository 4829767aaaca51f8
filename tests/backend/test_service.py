"""A call of `train` is a transaction: it happens whole, or it changes nothing."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gspo as art
from gspo.backend.stored_batch import read_batch
from gspo.core.draws import seed_of
from gspo.core.errors import GspoError, RunError
from gspo.train.checkpoint import steps_saved
from gspo.train.defaults import WARMUP, base_parameters, default_learning_rate
from gspo.train.trainer import TrainOutput
from support import choice, trajectory


@dataclass
class Registered:
    """A model that is ready to be trained, outside of any event loop."""

    backend: art.LocalBackend
    model: art.TrainableModel

    @property
    def folder(self) -> Path:
        return self.backend.run(self.model).folder

    def train(self, groups: Any, **options: Any) -> art.TrainResult:
        return asyncio.run(self.backend.train(self.model, groups, **options))

    def log(self, *args: Any, **options: Any) -> None:
        asyncio.run(self.model.log(*args, **options))

    def lines(self) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def saved(self) -> list[int]:
        return steps_saved(self.folder / "checkpoints")

    def state(self) -> tuple[Any, ...]:
        """Step, version, weights and disk."""
        trainer = self.backend._service(self.model).trainer
        weights = hashlib.sha256()
        for parameter in trainer.policy.lm.parameters():
            weights.update(parameter.detach().numpy().tobytes())
        files = {
            str(path): path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and path.name != ".lock"
        }
        return trainer.step, trainer.policy.version, weights.hexdigest(), files


def registered(path: Path, **options: Any) -> Registered:
    backend = art.LocalBackend(path, **options)
    # Tests train on Choices that no engine sampled.
    loading = art.dev.InternalModelConfig(exact=False)
    model = art.TrainableModel(
        name="m", project="p", base_model="embedded:sort", _internal_config=loading
    )
    asyncio.run(model.register(backend))
    return Registered(backend, model)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registered]:
    """One run for many calls: only the last checkpoint is kept."""
    logging.getLogger("gspo").setLevel(logging.ERROR)
    made = registered(tmp_path_factory.mktemp("shared"), keep_checkpoints=1)
    yield made
    asyncio.run(made.backend.close())
    logging.getLogger("gspo").setLevel(logging.NOTSET)


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Registered]:
    made = registered(tmp_path)
    yield made
    asyncio.run(made.backend.close())


def batch() -> list[art.TrajectoryGroup]:
    return [
        art.TrajectoryGroup([trajectory(float(i), choice([6 + i, 7])) for i in range(2)])
        for _ in range(2)
    ]


class Rude:
    def __repr__(self) -> str:
        raise RuntimeError("no")

    __str__ = __repr__


def cyclic() -> dict[str, Any]:
    message: dict[str, Any] = {"role": "user"}
    message["content"] = [message]
    return message


ODD = st.sampled_from(
    [
        *(None, True, 0, -1, 7, 10**400, 10**5000, 0.5, -0.5, 1e300, math.nan, math.inf, 1j),
        *("", "abc", "1.5", "\ud800", [], [1], [-1], [1.5, 2], [None], ["a"], [10**6, 1], [True]),
        *({"text": 5}, {"text": "x", "provider_specific_fields": 5}, {"message": {"a": 1}}),
        *({}, {"a": 1}, {"a": None}, {("a", 1): 2}, {"a": [1]}, object(), Rude(), cyclic()),
        *(np.float32(0.5), np.int64(3), np.bool_(True), np.float16(-1), np.ones(2), np.array(1.0)),
        *(np.array([6, 7]), np.array([-1.0, -2.0]), torch.tensor(0.25), torch.ones(2)),
        *(torch.tensor([6, 7]), torch.empty(2, device="meta"), torch.tensor(1.0).to("meta")),
        *([6, 7], [-0.1, -0.2], (6, 7), [np.int64(6), np.int64(7)], [np.float64(-1), -2.0]),
    ]
)
GSPOS = ("token_ids", "prompt_token_ids", "token_logprobs", "temperature", "policy_version")
PLACES = st.sampled_from(
    [
        *(("trajectory", name) for name in ("reward", "metrics", "metadata", "logs")),
        *(("trajectory", "messages_and_choices"), ("group", "metadata"), ("group", "trajectories")),
        *(("choice", name) for name in (*GSPOS, "routed_experts", "logprobs", "message")),
        *(("choice", "finish_reason"), ("metric", "x"), ("metadata", "x"), ("message", "content")),
        *(("metric", "reward"), ("metric", "loss/policy"), ("metric", "step"), ("item", "")),
    ]
)


def put(groups: list[art.TrajectoryGroup], place: tuple[str, str], value: Any) -> None:
    """Set a value somewhere in a batch, as a program may that nothing checks."""
    kind, name = place
    target = groups[1].trajectories[1]
    if kind == "trajectory":
        setattr(target, name, value)
    elif kind == "group":
        setattr(groups[1], name, value)
    elif kind == "choice":
        setattr(target.choices()[0], name, value)
    elif kind == "metric":
        target.metrics[name] = value
    elif kind == "metadata":
        target.metadata[name] = value
    elif kind == "message":
        target.messages_and_choices.insert(0, {"role": "user", name: value})
    else:
        target.messages_and_choices.insert(0, value)


@settings(max_examples=200)
@given(changes=st.lists(st.tuples(PLACES, ODD), min_size=1, max_size=2))
def test_train_happens_whole_or_not_at_all(
    shared: Registered, changes: list[tuple[tuple[str, str], Any]]
):
    groups = batch()
    for place, value in changes:
        try:
            put(groups, place, value)
        except (
            AttributeError,
            IndexError,
            KeyError,
            TypeError,
        ):  # the first change left nothing to change
            break
    before = shared.state()
    try:
        result = shared.train(groups, minibatches=1)
    except GspoError:
        assert shared.state() == before
        return
    step = before[0] + 1
    assert (result.step, shared.saved()) == (step, [step])
    assert shared.lines()[-1]["step"] == step
    assert (shared.folder / "trajectories" / "train" / f"{step:04d}.parquet").exists()


@pytest.mark.parametrize("value", [None, 5, "abc", [], [None], [trajectory(1.0)], [[]]])
def test_what_is_no_list_of_groups(shared: Registered, value: Any):
    before = shared.state()
    for call in (shared.train, lambda groups: asyncio.run(shared.model.train(groups))):
        with pytest.raises(GspoError):
            call(value)
    assert shared.state() == before


def test_token_ids_of_another_model_are_refused_before_anything_moves(shared: Registered):
    groups = batch()
    put(groups, ("choice", "token_ids"), [10**6, 7])
    before = shared.state()
    message = "group 1, trajectory 1 holds token id 1000000, but the model's vocabulary has"
    with pytest.raises(GspoError, match=message):
        shared.train(groups)
    assert shared.state() == before


def test_a_group_that_failures_thinned_to_one_is_a_flat_one(shared: Registered):
    thinned = art.TrajectoryGroup([trajectory(1.0, choice([8, 9]))], exceptions=[OSError("no")] * 3)
    alone = shared.train(batch(), minibatches=1).metrics
    result = shared.train([*batch(), thinned], minibatches=1)
    assert result.metrics["train/groups_zero_advantage"] == 1
    assert result.metrics["train/trajectories"] == alone["train/trajectories"] + 1
    assert result.metrics["train/exceptions"] == 3
    assert result.skipped is None
    stored = shared.folder / "trajectories" / "train" / f"{result.step:04d}.parquet"
    assert [len(group) for group in read_batch(stored).groups] == [2, 2, 1]


@pytest.mark.parametrize("broken", ["log", "trajectories"])
def test_the_checkpoint_is_saved_whatever_logging_does(
    fresh: Registered, broken: str, monkeypatch: pytest.MonkeyPatch
):
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    run = fresh.backend.run(fresh.model)
    with monkeypatch.context() as patch:
        patch.setattr(run, broken, full)
        message = r"step 1 is trained and its checkpoint .*0001 is saved.*No space left"
        with pytest.raises(RunError, match=message):
            fresh.train(batch())
    assert fresh.saved() == [1]
    assert fresh.train(batch()).step == 2
    assert fresh.saved() == [1, 2]


@pytest.mark.parametrize("broken", ["prune", "log"])
def test_a_full_disk_behind_the_save_says_that_the_step_is_saved(
    tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
):
    made = registered(tmp_path, keep_checkpoints=1)
    run = made.backend.run(made.model)
    plain = getattr(run, broken)

    def full(*args: Any) -> None:
        if broken == "log" and set(args[1]) != {"time/checkpoint"}:
            return plain(*args)
        raise RunError("cannot write: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run, broken, full)
        with pytest.raises(RunError, match=r"step 1 is trained .* is saved, .* older.*No space"):
            made.train(batch())
    assert made.saved() == [1]
    assert made.lines()[-1]["train/trajectories"] == 4
    assert made.train(batch()).step == 2
    asyncio.run(made.backend.close())


@pytest.mark.parametrize("broken", [False, True])
def test_the_engine_has_the_new_seed_whatever_becomes_of_the_call(
    fresh: Registered, broken: bool, monkeypatch: pytest.MonkeyPatch
):
    service = fresh.backend._service(fresh.model)
    run, engine = service.run, service.engine
    threads: list[str] = []
    begun, cancelled = threading.Event(), threading.Event()
    plain, update = engine.reseed, service.trainer.train

    def reseed(seed: int) -> None:
        threads.append(threading.current_thread().name)
        plain(seed)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    def held(*args: Any) -> TrainOutput:
        begun.set()
        assert cancelled.wait(30)
        return update(*args)

    monkeypatch.setattr(engine, "reseed", reseed)
    monkeypatch.setattr(service.trainer, "train", held)
    if broken:
        monkeypatch.setattr(run, "log", full)

    async def given_up() -> None:
        call = asyncio.create_task(fresh.backend.train(fresh.model, batch()))
        assert await asyncio.to_thread(begun.wait, 30)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        cancelled.set()
        await fresh.backend._compute.run(int)  # until the step is done

    asyncio.run(given_up())
    assert fresh.saved() == [1]
    assert vars(engine)["_seed"] == seed_of(fresh.backend.seed, 1)
    assert len(threads) == 1 and threads[0].startswith("gspo-compute")


def test_the_stored_batch_says_what_its_step_was_trained_with(fresh: Registered):
    for version in (0, 1):
        result = fresh.train(batch())
        stored = fresh.folder / "trajectories" / "train" / f"{result.step:04d}.parquet"
        record = read_batch(stored).record
        parameters = base_parameters(fresh.backend.policy(fresh.model))
        assert record.policy_version == version  # at the start of the step
        assert record.settings().learning_rate == default_learning_rate(parameters, False)
        assert record.settings().lr_warmup_steps == WARMUP


def test_metrics_of_the_users_never_replace_ours(fresh: Registered):
    groups = batch()
    ours = fresh.train(groups, minibatches=1).metrics
    names = ("reward", "groups_zero_advantage", "loss/policy", "ratio/clip_fraction", "right")
    for group in groups:
        for own in group:
            own.metrics = dict.fromkeys(names, 77.0)
    fresh.train(groups, minibatches=1)
    fresh.log(metrics={"loss/policy": 88.0, "train/reward": 88.0, "mine": 88.0}, split="train")
    line = fresh.lines()[1]
    for name in names[:-1]:
        assert line[f"train/user/{name}"] == (88.0 if name in ("loss/policy", "reward") else 77.0)
    assert line["train/right"] == 77.0
    assert line["train/mine"] == 88.0
    assert line["train/reward"] == ours["train/reward"] == 0.5
    assert math.isfinite(line["loss/policy"]) and abs(line["loss/policy"]) < 10


def test_arts_call_that_hands_the_result_back_adds_nothing(fresh: Registered):
    groups = batch()
    result = fresh.train(groups)
    before = fresh.lines()
    fresh.log(groups, split="train", metrics=result.metrics, step=result.step)
    assert fresh.lines() == before


def test_log_checks_as_train_does(shared: Registered):
    groups = batch()
    before = shared.state()
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((groups,), {"metrics": {"acc": None}}, r"metrics\['acc'\] is None"),
        ((groups,), {"metrics": 5}, "metrics is 5 .*must be a dict"),
        ((groups,), {"split": "../x"}, r"split = '\.\./x'"),
        ((groups,), {"step": -1}, "step = -1"),
        ((groups,), {"step": "1"}, "step = '1'"),
        ((5,), {}, "give a list"),
    ]
    for args, options, message in cases:
        with pytest.raises(GspoError, match=message):
            shared.log(*args, **options)
    put(groups, ("trajectory", "reward"), math.nan)
    with pytest.raises(GspoError, match="group 1, trajectory 1: reward is nan"):
        shared.log(groups)
    assert shared.state() == before


def test_the_best_checkpoint_is_never_deleted(tmp_path: Path):
    made = registered(tmp_path, keep_checkpoints=2)
    for reward in (0.9, math.nan, 0.4, 0.3, 0.2):
        made.train(batch())
        made.log(metrics={"reward_judged": reward})
        run = made.backend.run(made.model)
        run.log(int(run.metrics()[-1]["step"]), {"val/reward": reward})
    assert made.saved() == [1, 4, 5]
    run.log(5, {"val/reward": 0.95})
    made.train(batch())
    assert made.saved() == [5, 6]
    asyncio.run(made.backend.close())


def test_deleting_checkpoints_by_an_unknown_metric_deletes_nothing(fresh: Registered):
    asyncio.run(fresh.model.delete_checkpoints("val/none"))  # there is nothing to delete yet
    for accuracy in (math.nan, 0.9, 0.4):
        fresh.train(batch())
        fresh.log(metrics={"accuracy": accuracy}, split="val")
    for name, message in (("val/acuracy", "Did you mean 'val/accuracy'"), (None, "no metric None")):
        with pytest.raises(GspoError, match=f"{message}.*Logged: .*loss/policy"):
            asyncio.run(fresh.model.delete_checkpoints(name))  # pyright: ignore[reportArgumentType]
    assert fresh.saved() == [1, 2, 3]
    asyncio.run(fresh.model.delete_checkpoints("val/accuracy"))
    assert fresh.saved() == [2, 3]


def test_the_rate_is_tokens_over_the_time_of_training(shared: Registered):
    metrics = shared.train(batch()).metrics
    assert metrics["tokens/trained"] > 0
    rate = metrics["tokens/trained"] / metrics["time/train"]
    assert metrics["throughput/trained_tokens_per_second"] == pytest.approx(rate)
