"""The whole street with a real model: API, data errors, logging, checkpoints."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError
from openai.types.chat.chat_completion import Choice

import gspo as art
from gspo.backend import local, service
from gspo.backend.run import Run, in_use
from gspo.core.errors import (
    ConfigError,
    DataError,
    MissingLogprobsError,
    ModelError,
    RunError,
    SampleTooLongError,
    ServeError,
)
from gspo.serve.engine import Request
from gspo.serve.server import Serving
from gspo.train import checkpoint_writer
from models import folder
from support import choice, trajectory


def make(name: str = "m", base_model: str = "embedded:sort") -> art.TrainableModel:
    return art.TrainableModel(name=name, project="p", base_model=base_model)


@pytest.fixture
async def backend(tmp_path: Path):
    backend = art.LocalBackend(tmp_path)
    yield backend
    await backend.close()


@pytest.fixture
async def model(backend: art.LocalBackend) -> art.TrainableModel:
    model = make()
    await model.register(backend)
    return model


async def rollout(model: art.TrainableModel, text: str) -> art.Trajectory:
    messages = [{"role": "user", "content": text}]
    response = await model.openai_client().chat.completions.create(
        model=model.inference_name,
        messages=messages,  # pyright: ignore[reportArgumentType]
        max_tokens=16,
    )
    answer = response.choices[0]
    expected = "".join(sorted(text))
    right = sum(a == b for a, b in zip(answer.message.content or "", expected, strict=False))
    return art.Trajectory(
        messages_and_choices=[*messages, answer], reward=right / 12, metrics={"right": right}
    )


async def gather(model: art.TrainableModel, size: int = 4) -> list[art.TrajectoryGroup]:
    return await art.gather_trajectory_groups(
        art.TrajectoryGroup(rollout(model, text) for _ in range(size))
        for text in ("918273645546", "302010405060", "111122223333")
    )


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


async def test_rollouts_train_and_are_logged(model: art.TrainableModel, tmp_path: Path):
    groups = await gather(model)
    choices = [c for g in groups for t in g for c in t.choices()]
    assert all(isinstance(c, Choice) and c.token_ids for c in choices)  # pyright: ignore[reportAttributeAccessIssue]
    result = await model.train(
        groups,
        config=art.TrainConfig(learning_rate=1e-4),
        _config=art.dev.TrainConfig(importance_sampling_level="sequence"),
    )
    assert result.step == await model.get_step() == 1
    assert result.metrics["mismatch/log_ratio_abs_max"] < 1e-4
    run = tmp_path / "p" / "m"
    line = json.loads((run / "metrics.jsonl").read_text())
    assert line["step"] == 1
    assert {"train/reward", "train/right", "loss/policy", "ratio/clip_fraction"} <= set(line)
    rows = pq.read_table(run / "trajectories" / "train" / "0001.parquet").to_pylist()
    for row in rows:
        assert (row["token_log_ratios"] is None) == (row["advantage"] == 0)
        if row["token_log_ratios"] is not None:
            assert [len(d) for d in row["token_log_ratios"]] == [len(t) for t in row["token_ids"]]
    assert any(row["token_log_ratios"] for row in rows)
    assert result.checkpoint_path == run / "checkpoints" / "0001"
    assert json.loads((run / "config.json").read_text())["base_model"] == "embedded:sort"

    again = await gather(model)
    assert {c.policy_version for g in again for t in g for c in t.choices()} == {1}  # pyright: ignore[reportAttributeAccessIssue]


async def test_what_is_sampled_next_does_not_depend_on_an_evaluation(tmp_path: Path):
    async def sampled(evaluated: bool) -> list[Any]:
        backend = art.LocalBackend(tmp_path)  # goes on from the run's step each time
        model = make()
        await model.register(backend)
        if evaluated:
            await art.TrajectoryGroup(rollout(model, "555566667777") for _ in range(3))
        groups = await gather(model)
        if not evaluated:
            await model.train(groups)
        await backend.close()
        return [c.token_ids for g in groups for t in g for c in t.choices()]  # pyright: ignore[reportAttributeAccessIssue]

    whole = [await sampled(evaluated=False) for _ in range(2)]
    shutil.rmtree(tmp_path / "p")
    for step in range(2):
        assert await sampled(evaluated=True) == whole[step]
        assert await sampled(evaluated=False) == whole[step]
    assert whole[0] != whole[1]


async def test_a_batch_that_is_gathered_twice_is_sampled_anew(model: art.TrainableModel):
    first, second = await gather(model), await gather(model)
    tokens = [
        [c.token_ids for g in groups for t in g for c in t.choices()]  # pyright: ignore[reportAttributeAccessIssue]
        for groups in (first, second)
    ]
    assert tokens[0] != tokens[1]
    assert len({tuple(t) for t in tokens[0][:4]}) > 1


async def test_a_closed_backend_lets_go_of_the_weights(tmp_path: Path):
    backend = art.LocalBackend(tmp_path)
    model = make()
    await model.register(backend)
    await model.train(await gather(model))
    weights = weakref.ref(backend._service(model).trainer.policy)
    assert weights() is not None
    await backend.close()
    for _ in range(100):  # the thread that computed may be in its last frame still
        gc.collect()
        if weights() is None:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the weights of a closed backend are held")


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], tuple[threading.Event, ...]]:
    """Hold up a function of a class or module until it is let go."""

    def hold(owner: Any, name: str) -> tuple[threading.Event, ...]:
        begun, go_on, ended = (threading.Event() for _ in range(3))
        function = getattr(owner, name)

        def slow(*args, **kwargs):
            begun.set()
            go_on.wait(30)
            try:
                return function(*args, **kwargs)
            finally:
                ended.set()

        monkeypatch.setattr(owner, name, slow)
        return begun, go_on, ended

    return hold


async def test_a_step_that_is_being_saved_is_saved_before_the_run_is_let_go(
    tmp_path: Path, held, model: art.TrainableModel, backend: art.LocalBackend
):
    begun, go_on, _ = held(checkpoint_writer, "begin_checkpoint")
    training = asyncio.create_task(model.train(await gather(model)))
    assert await asyncio.to_thread(begun.wait, 30)
    training.cancel()
    closing = asyncio.create_task(backend.close())
    await asyncio.wait([training, closing], timeout=0.2)
    run = tmp_path / "p" / "m"
    assert training.cancelled() and not closing.done() and in_use(run)
    go_on.set()
    await closing
    assert not in_use(run)
    assert (run / "checkpoints" / "0001" / "manifest.json").exists()


async def test_a_step_that_is_being_computed_is_not_written_after_the_run_is_let_go(
    tmp_path: Path, held, model: art.TrainableModel, backend: art.LocalBackend
):
    begun, go_on, ended = held(backend._service(model).trainer, "train")
    publish = held(service.Service, "_publish")
    training = asyncio.create_task(model.train(await gather(model)))
    assert await asyncio.to_thread(begun.wait, 30)
    training.cancel()
    await backend.close()  # it doesn't wait for the update
    before = files(tmp_path)
    again = art.LocalBackend(tmp_path)
    await make().register(again)
    for event in (go_on, publish[1]):
        event.set()
    for event in (ended, publish[2]):
        assert await asyncio.to_thread(event.wait, 30)
    await again.close()
    assert files(tmp_path) == before
    assert not (tmp_path / "p" / "m" / "checkpoints").exists()


async def test_both_spellings_of_train_give_the_same_weights(tmp_path: Path):
    weights = []
    for name in ("model", "backend"):
        backend = art.LocalBackend(tmp_path / name)
        model = make()
        await model.register(backend)
        groups = await gather(model)
        if name == "model":
            config = art.dev.TrainConfig(epsilon=0.1, epsilon_high=0.2)
            await model.train(groups, art.TrainConfig(learning_rate=1e-3), config)
        else:
            await backend.train(model, groups, learning_rate=1e-3, epsilon=0.1, epsilon_high=0.2)
        path = tmp_path / name / "p" / "m" / "checkpoints" / "0001" / "model.safetensors"
        weights.append(path.read_bytes())
        await backend.close()
    assert weights[0] == weights[1]


async def test_misspelt_option_of_backend_train(model, backend: art.LocalBackend):
    with pytest.raises(ConfigError, match="Did you mean 'epsilon_high'"):
        await backend.train(model, [], epsilon_hig=0.2)


BAD_GROUPS = {
    "nothing": ([], DataError, "empty list"),
    "one": ([art.TrajectoryGroup([trajectory()])], DataError, "needs at least 2"),
    "nan": (
        [art.TrajectoryGroup([trajectory(float("nan")), trajectory()])],
        DataError,
        "group 0, trajectory 0: reward is nan",
    ),
    "inf": (
        [art.TrajectoryGroup([trajectory(), trajectory(float("inf"))])],
        DataError,
        "trajectory 1: reward is inf",
    ),
    "no choice": (
        [art.TrajectoryGroup([art.Trajectory(messages_and_choices=[], reward=1.0), trajectory()])],
        MissingLogprobsError,
        "has no Choice",
    ),
    "no token ids": (
        [art.TrajectoryGroup([trajectory(1, choice([4], token_ids=None)), trajectory()])],
        MissingLogprobsError,
        "no token_ids",
    ),
    "no log-probs": (
        [art.TrajectoryGroup([trajectory(1, choice([4], token_logprobs=None)), trajectory()])],
        MissingLogprobsError,
        "no log-probs",
    ),
    "too long": (
        [art.TrajectoryGroup([trajectory(1, choice([4] * 510)), trajectory()])],
        SampleTooLongError,
        "513 tokens, but the model's context is 512",
    ),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
async def test_bad_groups_are_refused_before_anything_is_written(model, tmp_path: Path, case: str):
    groups, error, message = BAD_GROUPS[case]
    before = files(tmp_path)
    with pytest.raises(error, match=message):
        await model.train(groups)
    assert files(tmp_path) == before
    assert await model.get_step() == 0


async def test_equal_rewards_are_reported_as_skipped(model: art.TrainableModel, tmp_path: Path):
    groups = [art.TrajectoryGroup([trajectory(1.0), trajectory(1.0)])]
    result = await model.train(groups)
    assert result.skipped is not None and "equal rewards" in result.skipped
    line = json.loads((tmp_path / "p" / "m" / "metrics.jsonl").read_text())
    assert line["train/skipped"] == 1
    assert line["optim/updates"] == 0


async def test_one_name_with_two_base_models(model, backend: art.LocalBackend):
    with pytest.raises(RunError, match="another name"):
        await make(base_model="embedded:reverse").register(backend)


async def test_not_registered():
    with pytest.raises(RunError, match=r"await model\.register\(backend\) first"):
        await make().get_step()
    with pytest.raises(RunError, match="not registered"):
        make().openai_client()


async def test_logging_a_split_and_deleting_checkpoints(model: art.TrainableModel, tmp_path: Path):
    run = tmp_path / "p" / "m"
    for reward in (0.2, 0.9, 0.3):
        await model.train(await gather(model))
        await model.log([art.TrajectoryGroup([trajectory(reward)])], split="val")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["val/reward"] for line in lines] == [0.2, 0.9, 0.3]
    assert (run / "trajectories" / "val" / "0003.parquet").exists()
    await model.delete_checkpoints()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["0002", "0003"]


async def test_a_prompted_model_is_logged_beside(backend: art.LocalBackend, tmp_path: Path):
    other = art.Model(name="gpt", project="p", inference_base_url="http://x", inference_api_key="k")
    await other.register(backend)
    await other.log([trajectory(0.5)], split="val")
    line = json.loads((tmp_path / "p" / "gpt" / "metrics.jsonl").read_text())
    assert line["val/reward"] == 0.5


async def test_requests_that_mean_nothing_are_refused_by_name(model: art.TrainableModel):
    client = model.openai_client()
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"temperature": -1}, "temperature"),
        ({"extra_body": {"temprature": 1}}, "Did you mean 'temperature'"),
        ({"logit_bias": {"3": 101}}, "logit_bias"),
        ({"max_tokens": 600}, "context is 512"),
    )
    for extra, message in cases:
        with pytest.raises(BadRequestError, match=message):
            await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "1"}], **extra
            )
    with pytest.raises(NotFoundError, match="no model 'other' here"):
        await client.chat.completions.create(
            model="other", messages=[{"role": "user", "content": "1"}]
        )


async def test_a_port_serves_clients_that_build_their_own(tmp_path: Path):
    backend = art.LocalBackend(tmp_path, port=0)
    model = make()
    await model.register(backend)
    client = AsyncOpenAI(base_url=model.inference_base_url, api_key=model.inference_api_key)
    assert str(client.base_url).startswith("http://127.0.0.1:")
    response = await client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "12"}], n=2, max_tokens=4
    )
    assert len(response.choices) == 2
    await client.close()
    await backend.close()


def test_work_in_one_event_loop_after_another(tmp_path: Path):
    """Two models that sample at once, and rollouts beside training, in several `asyncio.run`s."""
    backend = art.LocalBackend(tmp_path, port=0)
    models = [make("a"), make("b")]

    async def register() -> None:
        for model in models:
            await model.register(backend)

    async def sample() -> list[list[art.TrajectoryGroup]]:
        return await asyncio.gather(*(gather(model, 2) for model in models))

    async def train_and_sample(groups: list[list[art.TrajectoryGroup]]) -> None:
        pairs = zip(models, groups, strict=True)
        await asyncio.gather(sample(), *(model.train(own) for model, own in pairs))

    async def ask_the_port() -> int:
        model = models[0]
        async with AsyncOpenAI(base_url=model.inference_base_url, api_key="x") as client:
            response = await client.chat.completions.create(
                model="a", messages=[{"role": "user", "content": "12"}], n=2, max_tokens=4
            )
        return len(response.choices)

    def run(coroutine: Any) -> Any:
        return asyncio.run(asyncio.wait_for(coroutine, 120))

    run(register())
    for _ in range(2):
        run(train_and_sample(run(sample())))
        assert run(ask_the_port()) == 2
    assert [run(model.get_step()) for model in models] == [2, 2]
    run(backend.close())


async def test_an_occupied_port_is_named(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        backend = art.LocalBackend(tmp_path, port=port)
        with pytest.raises(ServeError, match=rf"127\.0\.0\.1:{port}"):
            await make().register(backend)
        await backend.close()


@pytest.mark.parametrize(("owner", "broken"), [(Run, "claim"), (local, "Trackers")])
async def test_a_register_that_fails_leaves_nothing_behind(
    tmp_path: Path, owner: object, broken: str, monkeypatch: pytest.MonkeyPatch
):
    def full(*args: object) -> None:
        raise RunError("cannot write: No space left on device")

    backend, model = art.LocalBackend(tmp_path, port=0), make()
    with monkeypatch.context() as patch:
        patch.setattr(owner, broken, full)
        with pytest.raises(RunError, match="No space left"):
            await model.register(backend)
    assert not in_use(tmp_path / "p" / "m")
    with pytest.raises(RunError, match="is not registered"):
        await backend.get_step(model)
    await model.register(backend)
    assert (await model.train(await gather(model))).step == 1
    await backend.close()


async def test_a_register_whose_server_fails_stops_all_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stopped: list[Serving] = []
    stop = Serving.stop

    async def noted(self: Serving) -> None:
        stopped.append(self)
        await stop(self)

    async def failing(self: Serving) -> None:
        raise ServeError("no start")

    monkeypatch.setattr(Serving, "stop", noted)
    monkeypatch.setattr(Serving, "_start_port", failing)
    backend = art.LocalBackend(tmp_path, port=0)
    with pytest.raises(ServeError, match="no start"):
        await make().register(backend)
    assert not in_use(tmp_path / "p" / "m")
    with pytest.raises(ServeError, match="closed"):
        await stopped[0]._engine.complete(Request((1, 2)))
    assert not stopped[0].app.state.engines
    assert stopped[0].client.is_closed()
    await backend.close()
    assert len(stopped) == 1


async def test_keep_checkpoints(tmp_path: Path):
    backend = art.LocalBackend(tmp_path, keep_checkpoints=1)
    model = make()
    await model.register(backend)
    for _ in range(2):
        await model.train(await gather(model))
    assert [p.name for p in (tmp_path / "p" / "m" / "checkpoints").iterdir()] == ["0002"]
    await backend.close()


async def test_a_misspelt_base_model_does_not_claim_the_name(tmp_path: Path):
    backend = art.LocalBackend(tmp_path)
    with pytest.raises(ModelError, match="Did you mean 'sort'"):
        await make(base_model="embedded:srot").register(backend)
    await make().register(backend)
    await backend.close()


async def test_arts_log_after_backend_train_keeps_the_advantages(model, tmp_path: Path):
    groups = await gather(model)
    result = await model.backend().train(model, groups, _config={"minibatches": 2})
    await model.log(groups, split="train", metrics=result.metrics, step=result.step)
    path = tmp_path / "p" / "m" / "trajectories" / "train" / "0001.parquet"
    assert all(row["advantage"] is not None for row in pq.read_table(path).to_pylist())


async def test_all_too_long_says_so(model: art.TrainableModel):
    long = [trajectory(r, choice([4] * 510)) for r in (0.0, 1.0)]
    config = art.dev.TrainConfig(on_too_long="drop")
    result = await model.train([art.TrajectoryGroup(long)], _config=config)
    assert result.skipped is not None and "longer than the context" in result.skipped


async def test_an_architecture_that_cannot_be_decoded_is_refused(tmp_path: Path):
    base = folder(tmp_path / "model", "recurrent_gemma")
    backend = art.LocalBackend(tmp_path / "runs")
    with pytest.raises(ModelError, match="RecurrentGemmaForCausalLM"):
        await make(base_model=base).register(backend)
    await backend.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_process": True}, "'in_process' is not supported: .*leave it out"),
        ({"keep_checkpoint": 1}, "Did you mean 'keep_checkpoints'"),
        ({"keep_checkpoints": 0}, "keep_checkpoints = 0 .*whole number from 1"),
        ({"keep_checkpoints": True}, "keep_checkpoints = True"),
        ({"port": 70000}, "port = 70000 .*from 0 to 65535"),
        ({"port": "80"}, "port = '80'"),
        ({"seed": 1.5}, r"seed = 1\.5 .*must be a whole number$"),
    ],
)
def test_arguments_that_mean_nothing(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        art.LocalBackend(**options)


async def test_a_backend_closes_itself_and_logs_a_dict_of_a_config(tmp_path: Path):
    model = art.TrainableModel(
        name="m", project="p", base_model="embedded:sort", config={"turns": 3, "path": tmp_path}
    )
    async with art.LocalBackend(tmp_path) as backend:
        await model.register(backend)
    async with art.LocalBackend(tmp_path) as backend:  # the run folder is free again
        await model.register(backend)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_context": 32}, "max_context None, not 32"),
        ({"dtype": "bfloat16"}, "dtype 'float32', not 'bfloat16'"),
        ({"lora": {"r": 4}}, "lora None, not {'r': 4"),
    ],
)
async def test_a_registered_name_is_not_loaded_otherwise(
    backend: art.LocalBackend, model: art.TrainableModel, options: dict[str, Any], message: str
):
    """A notebook's cell that is run again, with other options."""
    await make().register(backend)  # the same again
    again = make()
    again._internal_config = art.dev.InternalModelConfig(**options)
    with pytest.raises(RunError, match=f"is registered with {message}.*another name"):
        await again.register(backend)


UNUSED = (
    *("pandas", "matplotlib", "plotly", "typer", "datasets", "peft", "vllm", "llguidance"),
    *("tensorboard", "wandb", "trackio", "langgraph", "langchain_openai", "torch._inductor.graph"),
    *("gspo.cli", "gspo.lab", "gspo.experiment", "gspo.environments"),
)
TRAINED = f"""
import asyncio, os, sys
os.environ.pop("ARROW_DEFAULT_MEMORY_POOL", None)
import gspo as art
from test_local import rollout

async def main():
    model = art.TrainableModel(name="m", project="p", base_model="embedded:sort")
    async with art.LocalBackend(sys.argv[1]) as backend:
        await model.register(backend)
        groups = [art.TrajectoryGroup([await rollout(model, "312") for _ in range(2)])]
        for place, trajectory in enumerate(groups[0]):
            trajectory.reward = place
        await model.train(groups)

asyncio.run(main())
import pyarrow
pool = pyarrow.default_memory_pool().backend_name
print([name for name in {UNUSED} if name in sys.modules], pool)
"""


@pytest.mark.slow
def test_a_step_of_training_loads_nothing_that_it_does_not_use(tmp_path: Path):
    """Modules are a third of a small run's memory. Its sibling is `test_import_is_light`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", TRAINED, str(tmp_path)]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "[] system\n", done.stderr
