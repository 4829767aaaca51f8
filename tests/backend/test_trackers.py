"""Trackers show what metrics.jsonl holds, go on with a resumed run, and never stop one."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import struct
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

import gspo as art
from gspo.backend.run import Run
from gspo.backend.trackers import Trackers, check_loggers
from gspo.core.errors import ConfigError, MissingDependencyError
from gspo.experiment.loop import run_experiment
from gspo.experiment.plan import make_plan
from gspo.experiment.spec import Spec
from support import choice, trajectory

CONFIG = {"base_model": "embedded:sort"}
SIZES: Any = {"steps": 2, "prompts": 4, "completions": 8, "eval_prompts": 4, "task": "sort"}


class Silent:
    def started(self, spec: Spec, step: int, notes: list[str]) -> None: ...
    def stepped(self, step: int, metrics: dict[str, float]) -> None: ...
    def evaluated(self, step: int, estimate: Any) -> None: ...


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensorboard_of(folder: Path) -> Any:
    pytest.importorskip("tensorboard", reason="pip install -e '.[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return events


def scalars(events: Any) -> dict[int, dict[str, float]]:
    """Step -> name -> value, as TensorBoard shows them."""
    out: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in out.setdefault(event.step, {}), "a step is shown twice"
            out[event.step][name] = event.value
    return out


async def test_tensorboard_has_every_number_of_metrics_jsonl(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="pip install -e '.[tensorboard]'")
    spec = Spec(path=str(tmp_path), learning_rate=1e-3, logger=["tensorboard"], **SIZES)
    run = (await run_experiment(spec, Silent())).run
    await run_experiment(spec.model_copy(update={"steps": 3}), Silent())
    events = tensorboard_of(run)
    shown = scalars(events)
    assert len(records(run)) == 4
    assert "val/reward_high" in shown[0] and "time/rollout" in shown[3]
    for record in records(run):
        step = int(record.pop("step"))
        assert shown[step] == pytest.approx(record, rel=1e-6)
    [started, first, again, _] = [
        event.tensor_proto for event in events.Tensors("config/text_summary")
    ]
    assert '"minibatches": 4' in text(first) and '"epsilon_high": 0.0004' in text(first)
    assert '"train": {\n  "algorithm"' not in text(started)
    assert '"steps": 2' in text(started) and '"steps": 3' in text(again)


def text(proto: Any) -> str:
    return proto.string_val[0].decode()


def test_tensorboard_forgets_what_a_killed_process_logged(tmp_path: Path):
    folder = tmp_path / "p" / "m"
    first, again = {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0}, {3: 30.0, 4: 40.0}
    for step, logged in ((0, first), (2, again)):
        run = Run(tmp_path, "p", "m", CONFIG)
        run.trackers = Trackers(["tensorboard"], run, step, dict(CONFIG))
        for at, value in logged.items():
            run.log(at, {"a": value})
        run.close()
    values = {step: shown["a"] for step, shown in scalars(tensorboard_of(folder)).items()}
    assert values == {0: 0.0, 1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0}


async def test_a_prompted_model_is_tracked_too(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="pip install -e '.[tensorboard]'")
    for reward in (1.0, 3.0):  # two processes, of which the second measures an earlier step
        backend = art.LocalBackend(tmp_path, logger=["tensorboard"])
        model = art.Model(name="m", project="p", config=Spec(task="sort"))
        await model.register(backend)
        await model.log([trajectory(reward, choice([4]))], step=int(5 - reward))
        await backend.close()
    events = tensorboard_of(tmp_path / "p" / "m")
    assert {step: shown["val/reward"] for step, shown in scalars(events).items()} == {4: 1, 2: 3}
    assert '"task": "sort"' in text(events.Tensors("config/text_summary")[0].tensor_proto)


SESSION = """
import sys
from pathlib import Path
from gspo.backend.run import Run
from gspo.backend.trackers import Trackers
path, logger = sys.argv[1:]
for step, value in ((0, 0.25), (1, 0.5)):
    run = Run(Path(path), "p", "m", {"base_model": "embedded:sort"})
    run.trackers = Trackers([logger], run, step, {"base_model": "embedded:sort"})
    run.trackers.configure("train", {"epsilon": value})
    run.log(step + 1, {"train/reward": value})
    run.log(step, {"val/reward": value / 2})
    run.close()
"""
"""A run that is opened twice. What each opening logs last is of an earlier step."""


def isolated(code: str, *arguments: str, **environment: str) -> str:
    """Run in a process without this user's keys and settings; warnings are errors there too."""
    known = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    known |= {"PYTHONPATH": os.pathsep.join(sys.path), **environment}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=known,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of a .wandb file: blocks of 32 KiB; each chunk has a checksum, a size and a kind."""
    proto: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, at, body = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # no room for a header: the block is padded
            at += 2**15 - at % 2**15
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        body += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield proto.Record.FromString(body)
            body = b""


def test_wandb_goes_on_with_its_run_and_is_offline_without_a_key(tmp_path: Path):
    pytest.importorskip("wandb", reason="pip install -e '.[wandb]'")
    isolated(SESSION, str(tmp_path), "wandb", HOME=str(tmp_path), NETRC=str(tmp_path / "none"))
    identity = (tmp_path / "p" / "m" / "wandb-id").read_text()
    files = sorted((tmp_path / "p" / "m" / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))
    assert len(files) == 2
    rows, epsilons = [], []
    for file in files:
        for record in wandb_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                assert (record.run.run_id, record.run.project) == (identity, "p")
                assert record.run.display_name == "m"
            if kind in ("run", "config"):
                config = record.run.config if kind == "run" else record.config
                found = {u.key: json.loads(u.value_json) for u in config.update}
                epsilons += [found["train"]["epsilon"]] if "train" in found else []
            if kind == "history":
                items = {
                    i.key or "/".join(i.nested_key): json.loads(i.value_json)
                    for i in record.history.item
                }
                rows.append({k: v for k, v in items.items() if not k.startswith("_")})
            if kind == "metric" and record.metric.glob_name:
                assert (record.metric.glob_name, record.metric.step_metric) == ("*", "step")
    assert epsilons == [0.25, 0.5]
    assert rows == [
        {"step": 1, "train/reward": 0.25},
        {"step": 0, "val/reward": 0.125},
        {"step": 2, "train/reward": 0.5},
        {"step": 1, "val/reward": 0.25},
    ]


def test_wandb_with_a_key_is_not_forced_offline(tmp_path: Path):
    pytest.importorskip("wandb", reason="pip install -e '.[wandb]'")
    code = "import wandb; from gspo.backend.trackers import _wandb_mode; print(_wandb_mode(wandb))"
    home = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    assert isolated(code, **home, WANDB_API_KEY="a" * 40).split() == ["None"]
    assert isolated(code, **home, WANDB_MODE="disabled").split() == ["None"]


TRACKIO_LOGS = """
import json
from trackio.sqlite_storage import SQLiteStorage
runs = SQLiteStorage.get_runs("p")
print(json.dumps([runs, SQLiteStorage.get_run_config("p", "m"), SQLiteStorage.get_logs("p", "m")]))
"""


def test_trackio_goes_on_with_its_run(tmp_path: Path):
    pytest.importorskip("trackio", reason="pip install -e '.[trackio]'")
    home = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path)}
    written = isolated(SESSION + TRACKIO_LOGS, str(tmp_path), "trackio", **home)
    runs, config, logs = json.loads(written.splitlines()[-1])
    assert runs == ["m"]
    assert (config["base_model"], config["train"]) == ("embedded:sort", {"epsilon": 0.5})
    shown = [{k: v for k, v in row.items() if k != "timestamp"} for row in logs]
    assert shown == [
        {"step": 1, "train/reward": 0.25},
        {"step": 0, "val/reward": 0.125},
        {"step": 2, "train/reward": 0.5},
        {"step": 1, "val/reward": 0.25},
    ]


class BrokenClient(types.ModuleType):
    """Stands where `wandb` would; raises wherever it is told to."""

    Settings = dict
    run = None

    def __init__(self, *broken: str):
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None, origin="a test")
        self.broken = broken
        self.called: list[str] = []
        self.config = self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.called.append(name)
            if name in self.broken:
                raise OSError(f"no {name} today")
            return self

        return call

    @property
    def settings(self) -> Any:
        return types.SimpleNamespace(mode="online")


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (("init",), "wandb could not start: OSError: no init today"),
        (("update",), "wandb could not configure"),
        (("log",), "wandb could not log"),
        (("finish",), "wandb could not finish"),
        (("update", "log", "finish"), "wandb could not configure"),
    ],
)
def test_a_broken_tracker_is_one_warning_and_never_stops_a_run(
    broken: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    client = BrokenClient(*broken)
    monkeypatch.setitem(sys.modules, "wandb", client)
    with caplog.at_level(logging.WARNING, "gspo"):
        run = Run(tmp_path, "p", "m", CONFIG)
        run.trackers = Trackers(["wandb"], run, 0, dict(CONFIG))
        run.trackers.configure("train", {"epsilon": 0.1})
        for step in range(3):
            run.log(step, {"train/reward": 0.5})
        run.close()
    warnings = [r.getMessage() for r in caplog.records if "wandb" in r.getMessage()]
    assert len(warnings) == 1 and warnings[0].startswith(said)
    assert [record["step"] for record in records(run.folder)] == [0, 1, 2]
    assert set(broken) <= set(client.called)
    if broken != ("init",):  # what fails once is tried again: a server may come back
        assert client.called.count("log") >= 3 and client.called.count("finish") == 1


async def test_an_experiment_ends_though_its_tracker_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    client = BrokenClient("update", "log", "finish")
    monkeypatch.setitem(sys.modules, "wandb", client)
    with caplog.at_level(logging.WARNING, "gspo"):
        spec = Spec(path=str(tmp_path), learning_rate=1e-3, logger=["wandb"], **SIZES)
        run = (await run_experiment(spec, Silent())).run
    assert len([r for r in caplog.records if "wandb" in r.getMessage()]) == 1
    assert [record["step"] for record in records(run)] == [0, 1, 2]
    assert client.called.count("finish") == 1


@pytest.mark.parametrize(
    ("logger", "message"),
    [
        (["tensorbord"], "Did you mean 'tensorboard'"),
        (["wandb", "mlflow"], "unknown tracker 'mlflow'.*Known: 'tensorboard', 'trackio', 'wandb'"),
        ("wandb", r"give a list, \['wandb'\]"),
        ([3], "unknown tracker 3"),
    ],
)
def test_misspelt_trackers_are_named(logger: Any, message: str, monkeypatch: pytest.MonkeyPatch):
    found = ModuleSpec("x", None, origin="here")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(ConfigError, match=message):
        art.LocalBackend(logger=logger)


def test_misspelt_trackers_are_named_in_a_spec():
    with pytest.raises(ConfigError, match="Did you mean 'wandb'"):
        Spec(task="sort", logger=["wanbd"])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("found", [None, ModuleSpec("wandb", None)], ids=["nothing", "a folder"])
async def test_a_missing_client_is_said_before_any_work(
    found: ModuleSpec | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    spec = Spec(path=str(tmp_path / "runs"), logger=["wandb"], **SIZES)
    with pytest.raises(MissingDependencyError, match=r"pip install -e '\.\[wandb\]'"):
        await run_experiment(spec, Silent())
    with pytest.raises(MissingDependencyError):
        make_plan(spec)
    assert not (tmp_path / "runs").exists()


def test_a_tracker_named_twice_is_one():
    pytest.importorskip("tensorboard", reason="pip install -e '.[tensorboard]'")
    assert check_loggers(["tensorboard", "tensorboard"]) == ("tensorboard",)
