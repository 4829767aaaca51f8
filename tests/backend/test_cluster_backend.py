from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import gspo as art
from gspo.backend.cluster_backend import ClusterBackend, ShardedService, check_divided, check_ranks
from gspo.core.errors import ConfigError
from gspo.dev import InternalModelConfig
from gspo.policy.load import load_policy
from gspo.train.checkpoint import steps_saved

USER = """
import asyncio, os, signal, sys
import gspo as art
from gspo.backend.cluster_backend import ClusterBackend
from gspo.train import checkpoint
from gspo.train.mesh import Mesh
from gspo.weights import gathered_copy

PLACES = {
    "backward": (Mesh, "backward"),
    "checkpoint": (checkpoint, "_write_shards"),
    "gather": (gathered_copy, "full"),
}

def strike(place, rank, call, kind):
    owner, name = PLACES[place]
    real, calls = getattr(owner, name), []
    def run(*args, **options):
        calls.append(1)
        if len(calls) == int(call):
            os.kill(os.getpid(), getattr(signal, kind))
        return real(*args, **options)
    if os.environ["RANK"] == rank:
        setattr(owner, name, run)

async def main(nproc, path, steps, fault):
    if ":" in fault:
        strike(*fault.split(":"))
    kind = {"timeout": 60.0} if nproc == 0 else {"nproc": nproc, "timeout": 60.0}
    async with ClusterBackend(path=path, **kind) as backend:
        model = art.TrainableModel(name="m", project="p", base_model="embedded:sort")
        await model.register(backend)
        client = model.openai_client()
        for step in range(steps):
            async def group(k):
                asked = [{"role": "user", "content": f"{k} 5 1 9"}]
                answer = await client.chat.completions.create(
                    model="m", messages=asked, max_completion_tokens=12, seed=step * 100 + k, n=4)
                return art.TrajectoryGroup([
                    art.Trajectory(messages_and_choices=[*asked, c],
                                   reward=float(len(set(c.message.content or "")))) 
                    for c in answer.choices])
            groups = [await group(k) for k in range(6)]
            if fault == "kill" and step == 1:
                os.kill(backend._children[0].pid, signal.SIGKILL)
            done = await model.train(groups, art.TrainConfig(learning_rate=1e-3))
            print(done.step, done.metrics["loss/policy"], done.metrics["publish/probe_max_diff"])

asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]))
"""


def user(nproc: int, path: Path, steps: int, fault: str = "", launcher: tuple[str, ...] = ()):
    script = path.parent / "user.py"
    script.write_text(USER)
    command = [sys.executable, *launcher, str(script), str(nproc), str(path), str(steps), fault]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def by_hand(ranks: int, path: Path, steps: int, fault: str = "") -> list[tuple[int, str]]:
    """Start each rank without a launcher, which would end the others itself; exit status and
    errors of each.

    Args:
        fault: the place of `PLACES`, the rank, the call of it there, and the signal.
    """
    script = path.parent / "user.py"
    script.write_text(USER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started = []
    for rank in range(ranks):
        number = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        env = os.environ | {"OMP_NUM_THREADS": "1"} | where | number
        command = [sys.executable, str(script), "0", str(path), str(steps), fault]
        with (path.parent / f"errors-{rank}").open("w") as errors:
            started.append(subprocess.Popen(command, env=env, stderr=errors))
    try:
        codes = [process.wait(300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(code, (path.parent / f"errors-{r}").read_text()) for r, code in enumerate(codes)]


def losses(path: Path) -> list[float]:
    lines = (path / "p/m/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss/policy"] for line in lines if "loss/policy" in line]


def test_what_is_not_built_or_contradicts_itself_is_refused(monkeypatch, tmp_path):
    for nproc in (0, 1000):  # of which the second would start 999 more processes here
        with pytest.raises(ConfigError, match="nproc"):
            check_ranks(nproc, {})
    for name in ("cp_size", "ep_size"):
        with pytest.raises(ConfigError, match=f"{name}=3 does not divide 4, .*torchrun"):
            ClusterBackend(tmp_path, nproc=4, **cast(Any, {name: 3}))
        with pytest.raises(ConfigError, match=name):
            ClusterBackend(tmp_path, nproc=2, **cast(Any, {name: 4}))
    with pytest.raises(ConfigError, match=r"ClusterBackend: .*'nprocs'. Did you mean 'nproc'"):
        ClusterBackend(tmp_path, nprocs=2)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="nproc=4, but torchrun has started 2"):
        ClusterBackend(tmp_path, nproc=4)
    monkeypatch.setenv("WORLD_SIZE", "1024")  # on many machines
    assert check_ranks(1024, {}) == 1024


def test_ranks_compare_what_each_was_told(monkeypatch, tmp_path):
    """Under torchrun each rank has a script of its own, and only the first one's counts."""

    def mesh(timeout, settings):
        raise ConfigError(json.dumps(settings))

    monkeypatch.setattr("gspo.backend.cluster_backend.Mesh", mesh)
    started = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as told:
        ClusterBackend(tmp_path, cp_size=2, seed=3, config={"dtype": "bfloat16"})
    own = {"path": str(tmp_path), "cp_size": "2", "ep_size": "1", "seed": "3", "dtype": "bfloat16"}
    assert json.loads(str(told.value)) == {"timeout": "600.0", **own}


def test_a_precision_of_its_own_is_for_servers():
    """Ranks' own engine computes in float32."""
    rounded = InternalModelConfig(rollout_dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"rollout_dtype are not built .*engines="):
        check_divided(rounded, 1, [])
    check_divided(rounded, 1, ["http://localhost:1"])


def test_one_process_starts_nothing(tmp_path):
    backend = ClusterBackend(tmp_path, nproc=1)
    assert backend._ranks is None and not backend._children


@pytest.mark.parametrize(
    ("error", "failed"),
    [(None, False), (ValueError(), True), (SystemExit(0), False), (SystemExit(7), True)],
)
def test_the_other_ranks_fail_with_the_script_of_the_first(error, failed, tmp_path):
    """Else the torchrun of another machine reports success."""
    told: list[bool] = []

    async def script() -> None:
        backend = ClusterBackend(tmp_path)
        backend._ranks = cast(Any, SimpleNamespace(mesh=SimpleNamespace(), close=told.append))
        with suppress(BaseException):
            async with backend:
                if error is not None:
                    raise error

    asyncio.run(script())
    assert told == [failed]


def test_why_ranks_are_not_equal_to_the_bit_is_what_holds_for_them(monkeypatch):
    """`exact=False` cannot be the reason: `exact=True` is refused."""
    for name in ("load_step", "GatheredCopy", "proved_engine"):
        made = SimpleNamespace(policy=SimpleNamespace())
        monkeypatch.setattr(f"gspo.backend.cluster_backend.{name}", lambda *_, m=made, **__: m)
    service: Any = ShardedService.__new__(ShardedService)
    service._copied = "base", InternalModelConfig(), None
    service.trainer = SimpleNamespace(policy=SimpleNamespace(version=0))
    service._proved(InternalModelConfig())
    assert service.trainer.policy.not_exact.startswith("several ranks train")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    """1 + 1 + 1 steps by 4, 1 and 2 ranks are three steps by one process.

    Ranks add in another order, which may move a drawn token, on an AMD processor one of 288 in the
    second step: from there on the losses are only alike. That of a run that began anew would be
    twice as large.
    """
    for ranks in (4, 1, 2):
        done = user(ranks, tmp_path / "many", 1)
        assert done.returncode == 0, done.stderr[-2000:]
    for _ in range(3):
        assert user(1, tmp_path / "one", 1).returncode == 0
    many, one = losses(tmp_path / "many"), losses(tmp_path / "one")
    assert many[0] == pytest.approx(one[0], rel=1e-4)
    assert many == pytest.approx(one, rel=0.2)


@pytest.mark.slow
def test_the_same_script_runs_under_torchrun(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    done = user(0, tmp_path / "r", 1, launcher=launcher)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(losses(tmp_path / "r")) == 1


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_same_command_goes_on(tmp_path):
    done = user(2, tmp_path / "r", 2, "kill")
    assert done.returncode == 1
    assert re.search(r"RunError: rank 1 \(.*\): ended", done.stderr), done.stderr[-2000:]
    done = user(2, tmp_path / "r", 1)
    assert done.returncode == 0 and done.stdout.startswith("2 "), done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "fault"),
    [
        (4, "backward:1:6:SIGKILL"),  # the last rank exchanges nothing with it in most sums
        (2, "checkpoint:1:2:SIGKILL"),
        (2, "gather:1:100:SIGKILL"),
    ],
)
def test_all_name_the_rank_that_ended_and_the_run_ends_as_an_undisturbed_one(
    ranks, fault, tmp_path
):
    for rank, (code, errors) in enumerate(by_hand(ranks, tmp_path / "r", 2, fault)):
        if rank == 1:
            assert code == -signal.SIGKILL
        else:
            named = re.findall(r"rank (\d) \([^)]*\): (?:ended|\w+Error)", errors)
            assert code == 1 and set(named) == {"1"}, errors[-2000:]
    done = sum(steps_saved(tmp_path / "r/p/m/checkpoints")) > 0
    assert all(code == 0 for code, _ in by_hand(ranks, tmp_path / "r", 2 - done))
    assert all(code == 0 for code, _ in by_hand(ranks, tmp_path / "whole", 1))
    assert all(code == 0 for code, _ in by_hand(ranks, tmp_path / "whole", 1))
    weights = [
        (tmp_path / run / "p/m/checkpoints/0002/model.safetensors").read_bytes()
        for run in ("r", "whole")
    ]
    assert weights[0] == weights[1]


RUN = """
name = "m"
path = "runs"
task = "sort"
steps = 2
prompts = 4
completions = 4
eval_prompts = 0
[load]
LORA
[sft]
data = "lessons.jsonl"
batch_size = 2
"""
LESSONS = [("3 1 2", "1 2 3"), ("9 4", "4 9"), ("5 5 1 0", "0 1 5 5")]


def lessons() -> str:
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in LESSONS
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def gspo(folder: Path, *arguments: str, ranks: int = 0) -> None:
    """Ends well. `ranks`: as many as torchrun starts."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *launcher, "-m", "gspo.cli", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "number"),
    [("rank 1", signal.SIGTERM), ("all", signal.SIGINT), ("all", signal.SIGTERM)],
)
def test_a_signal_to_any_rank_ends_all_in_order_and_the_same_command_goes_on(
    target, number, tmp_path
):
    """`all`: as Ctrl-C on a terminal does, or a batch system."""
    (tmp_path / "run.toml").write_text(RUN.split("[load]")[0])
    more = ["--set", "nproc=2", "--set", "checkpoint_every=3"]
    command = [sys.executable, "-m", "gspo.cli", "train", "run.toml", *more, "--set", "steps=500"]
    env, run = os.environ | {"OMP_NUM_THREADS": "1"}, tmp_path / "runs/gspo/m"
    kind = {"start_new_session": True, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=env, **kind) as process:
        limit = time.monotonic() + 120
        while not steps_saved(run / "checkpoints") and time.monotonic() < limit:
            time.sleep(0.05)
        if target == "all":
            os.killpg(process.pid, number)
        else:
            (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(child), number)
        errors = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number, errors
    done = steps_saved(run / "checkpoints")[-1]
    assert f"stopped by {number.name}: {done} of 500 steps" in errors and "Traceback" not in errors
    assert (f"rank 1 ({socket.gethostname()}) was told" in errors) == (target != "all")
    for name in ("m", "whole"):
        gspo(tmp_path, *command[3:7], "--set", f"steps={done + 1}", "--set", f"name={name}")
    files = [f"{n}/checkpoints/{done + 1:04d}/model.safetensors" for n in ("m", "whole")]
    assert len({(run.parent / file).read_bytes() for file in files}) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("divided", "load"),
    [
        ("cp_size", "lora = {r = 4}"),
        ("ep_size", "lora = {r = 4, target_modules = ['q_proj', 'v_proj']}"),
        ("ep_size", ""),
    ],
)
def test_a_run_with_sft_is_that_of_one_process_and_is_exported(divided, load, tmp_path):
    """By two ranks, which first divide sequences or experts, and then microbatches."""
    (tmp_path / "run.toml").write_text(RUN.replace("LORA", load))
    (tmp_path / "lessons.jsonl").write_text(lessons())
    train = ("train", "run.toml", "--set", "steps=3", "--set")
    gspo(tmp_path, "train", "run.toml", "--set", "nproc=2", "--set", f"{divided}=2")
    gspo(tmp_path, *train[:-1], ranks=2)  # goes on
    gspo(tmp_path, *train, "name=one")
    metrics = [
        [
            json.loads(line)
            for line in (tmp_path / "runs/gspo" / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("m", "one")
    ]
    for name in ("sft/loss", "loss/policy", "train/reward"):
        many, one = ([line[name] for line in lines if name in line] for lines in metrics)
        assert many and many == pytest.approx(one, rel=1e-4, abs=1e-5), name
    gspo(tmp_path, "export", "m", "--path", "runs", "--to", "out", *["--merge"] * ("lora" in load))
    load_policy(str(tmp_path / "out"))


STAND_IN = Path(__file__).parents[1] / "vllm_stand_in.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "load"),
    [
        ([], "dtype = 'float32'"),
        (["cp_size=2"], "lora = {r = 4}"),
        (["ep_size=2"], "rollout_dtype = 'float32'"),
    ],
)
def test_servers_sample_for_ranks_as_for_one_process(more, load, tmp_path):
    """Whole weights reach them, and prove it; the same tokens are trained on."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {STAND_IN} "$@"\n')
    python.chmod(0o755)
    source = os.pathsep.join(map(str, (Path(art.__file__).parents[1], STAND_IN.parent)))
    engines = f'engines = ["env PYTHONPATH={source} {python}"]\n[load]\n{load}\n'
    (tmp_path / "run.toml").write_text(RUN.split("[load]")[0] + engines)
    told = [word for setting in ("nproc=2", *more) for word in ("--set", setting)]
    gspo(tmp_path, "train", "run.toml", *told)
    gspo(tmp_path, "train", "run.toml", "--set", "name=one")
    many, one = (
        [
            json.loads(line)
            for line in (tmp_path / "runs/gspo" / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("m", "one")
    )
    assert len(many) == len(one) == 2
    for name in ("loss/policy", "train/reward", "optim/grad_norm", "tokens/completion"):
        told = [[line[name] for line in lines] for lines in (many, one)]
        assert told[0] == pytest.approx(told[1], rel=1e-3), name
    assert all(line["publish/probe_max_diff"] < 1e-4 for line in many)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_ctrl_c_ends_ranks_while_a_server_is_awaited(stopped, tmp_path):
    """One that never comes, when the model is registered; or that hangs, when a step is trained."""
    python = tmp_path / "python"
    serve = f'shift 2\nexec {sys.executable} {STAND_IN} "$@"\n' if stopped else "exec sleep 300"
    python.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\n{serve}")
    python.chmod(0o755)
    source = os.pathsep.join(map(str, (Path(art.__file__).parents[1], STAND_IN.parent)))
    engines = f'engines = ["env PYTHONPATH={source} {python}"]\n'
    (tmp_path / "run.toml").write_text(RUN.split("[load]")[0] + engines)
    more = ["run.toml", "--set", "nproc=2", "--set", "steps=500"]
    command = [sys.executable, "-m", "gspo.cli", "train", *more]
    env, limit = os.environ | {"OMP_NUM_THREADS": "1"}, time.monotonic() + 120
    log = tmp_path / "runs/gspo/m/metrics.jsonl"
    awaited = log if stopped else tmp_path / "pid"
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE) as process:
        while not (awaited.exists() and awaited.stat().st_size) and time.monotonic() < limit:
            time.sleep(0.05)
        if stopped:
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGSTOP)
            time.sleep(5)  # the next publication, or what is sampled for it, waits for the server
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        errors = process.communicate(timeout=200)[1].decode()
    assert time.monotonic() - started < 55, errors[-2000:]  # the server has 20 s to end
    assert process.returncode == 128 + signal.SIGINT, errors[-2000:]
