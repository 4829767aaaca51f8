from __future__ import annotations

import signal
import subprocess
import sys
import time
from threading import current_thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed as dist

from gspo.backend import ranks
from gspo.backend.ranks import Ranks, _check_shared, _passed_on
from gspo.core.errors import ConfigError, RunError
from gspo.train.trainer import Trainer


class Told:
    """Notes what is sent to the other ranks."""

    def __init__(self, send):
        self.send, self.values = send, []

    def __call__(self, value):
        self.values.append(value)
        return self.send(value)


class OneRank:
    """A mesh of one, or of the first rank and another that says something else."""

    rank, hosts, broken = 0, ("a", "b"), ""

    def __init__(self, *others):
        self.others, self.closed = others, False

    def share(self, value):
        return value

    def gather(self, value):
        return [value, *self.others]

    def together(self, work):
        return work()

    def close(self):
        self.closed = True


def test_the_mesh_is_each_ranks_own_and_results_come_back():
    mesh = OneRank()
    first = Ranks(mesh)  # pyright: ignore[reportArgumentType]
    assert first.call(lambda own, other: (own is mesh, other), mesh, 3) == (True, 3)
    assert first.mesh.everywhere == first.call
    first.close()
    assert mesh.closed


def test_a_trainers_policy_is_each_ranks_own_too():
    """So that what publishes weights may be called with the policy, which no rank could send."""
    trainer, ranks = Trainer.__new__(Trainer), Ranks(OneRank())  # pyright: ignore[reportArgumentType]
    trainer.policy = object()  # pyright: ignore[reportAttributeAccessIssue]
    assert ranks.call(lambda: trainer) is trainer
    told = ranks.mesh.share = Told(ranks.mesh.share)
    assert ranks.call(lambda policy: policy, trainer.policy) is trainer.policy
    assert told.values[0][1] == [(2, None)]


@pytest.mark.parametrize("fault", ["", "the first rank has ended"])
def test_a_rank_that_follows_leaves_by_its_status_alone(fault, monkeypatch, capsys):
    """What surrounds it in a script sees no exception: `gspo train` would call it an error."""
    mesh = OneRank()

    def leave(status):
        raise KeyboardInterrupt(status)

    def await_work():
        mesh.broken = fault
        if fault:
            raise RunError(fault)

    monkeypatch.setattr(mesh, "await_work", await_work, raising=False)
    monkeypatch.setattr(mesh, "share", lambda _: (ranks.Status, []))
    monkeypatch.setattr(ranks, "leave", leave)
    with pytest.raises(KeyboardInterrupt, match=str(int(bool(fault)))):
        ranks.follow(mesh)  # pyright: ignore[reportArgumentType]
    assert fault in capsys.readouterr().err


@pytest.mark.parametrize("there", [False, True])
def test_the_thread_that_works_has_the_gpu_of_its_rank(there, monkeypatch):
    """CUDA gives each new thread the machine's first one: all ranks would load their part there."""
    mesh, gpus = OneRank(), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda gpu: gpus.append((current_thread().name, gpu))
    )
    monkeypatch.setattr(mesh, "await_work", lambda: None, raising=False)
    monkeypatch.setattr(mesh, "share", lambda _: (ranks.Status, []))
    monkeypatch.setattr(ranks, "leave", lambda _: None)
    ranks.follow(mesh)  # pyright: ignore[reportArgumentType]
    assert gpus == [("gspo-rank-0", 3 if there else -1)]


@pytest.mark.parametrize(("failed", "torchrun"), [(True, True), (True, False), (False, True)])
def test_under_torchrun_a_script_that_fails_can_say_why(failed, torchrun, monkeypatch):
    """With the first status that is not 0, torchrun ends all ranks of its machine."""
    mesh, happened = OneRank(), []
    monkeypatch.setattr(mesh, "await_work", lambda: None, raising=False)
    monkeypatch.setattr(mesh, "share", lambda _: (ranks.Status, [(None, failed)]))
    monkeypatch.setattr(ranks, "leave", happened.append)
    monkeypatch.setattr(ranks.time, "sleep", lambda seconds: happened.append(("waits", seconds)))
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    ranks.follow(mesh)  # pyright: ignore[reportArgumentType]
    assert happened == [("waits", 30.0)] * (failed and torchrun) + [int(failed)]


@pytest.mark.parametrize("closing", [False, True])
def test_a_rank_whose_work_has_ended_ends_by_the_first_signal(closing, monkeypatch):
    """It has nobody to pass it on to."""
    mesh, happened, handlers = SimpleNamespace(closing=closing), [], {}
    monkeypatch.setattr(ranks.signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(ranks, "leave", happened.append)
    monkeypatch.setattr(ranks, "Timer", lambda *_: SimpleNamespace(start=lambda: None))
    ranks._pass_on_signals(mesh)  # pyright: ignore[reportArgumentType]
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert happened == [143] * closing


@pytest.mark.parametrize("failed", [False, True])
def test_a_rank_ends_as_the_first_ones_script_whatever_was_refused_before(
    failed, monkeypatch, capsys
):
    """After a 0, torchrun waits minutes at its exit for the machine whose rank has failed."""
    mesh, works = OneRank(), [(refused, [])]
    monkeypatch.setattr(mesh, "await_work", lambda: None, raising=False)
    first, other = (Ranks(mesh) for _ in range(2))  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(mesh, "share", lambda work: works.append(work) or work)
    first.close(failed)
    monkeypatch.setattr(mesh, "share", lambda _: works.pop(0))
    assert other.follow() == int(failed)
    assert "rank 0: ConfigError: other files" in capsys.readouterr().err


def refused() -> None:
    raise ConfigError("other files")


def test_a_folder_that_a_rank_cannot_see_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^rank 1 \(b\): No such file\. .*machines share"):
        _check_shared(OneRank("No such file"), tmp_path)  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_the_first_rank_cannot_write_is_told_to_all(tmp_path, monkeypatch):
    """It would be alone with an error of its own, and the others wait for it."""
    monkeypatch.setattr(ranks, "GRACE", 0.1)
    mesh, shared = OneRank("No such file"), []
    monkeypatch.setattr(mesh, "share", lambda value: shared.append(value) or value)
    told = r"rank 0 \(a\): \[Errno 2\] No such file .*; rank 1 \(b\): No such file\. Rank 0"
    with pytest.raises(ConfigError, match=told):
        _check_shared(mesh, tmp_path / "none")  # pyright: ignore[reportArgumentType]
    assert len(shared) == 1


FOLLOWS = """
import signal, sys
from datetime import timedelta
from torch.distributed import TCPStore
from gspo.backend import ranks

class Mesh:
    rank, hosts, closing = 1, "ab", False
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def await_work(self):
        print("waits", flush=True)
        self.store.wait(["work"], timedelta(seconds=60))

def passed_on(mesh, number):
    print("passed on", number, flush=True)
    return sys.argv[2] == "lives"

signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
ranks.GRACE, ranks._passed_on = float(sys.argv[1]), passed_on
ranks.follow(Mesh())
"""


@pytest.mark.parametrize(("grace", "first"), [("0.05", "lives"), ("0.05", "ended"), ("60", "")])
def test_a_signal_is_passed_on_to_the_first_rank_and_a_second_one_ends_this(grace, first):
    """Though it waits inside torch, where Python answers no signal. Without a first rank it ends
    by the first signal."""
    command = [sys.executable, "-c", FOLLOWS, grace, first]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        process.send_signal(signal.SIGINT)
        if grace == "60":
            time.sleep(0.2)  # two that are pending would be taken in the order of their numbers
        else:
            assert process.stdout.readline() == f"passed on {int(signal.SIGINT)}\n"
        if first != "ended":
            process.send_signal(signal.SIGTERM)
        last = signal.SIGINT if first == "ended" else signal.SIGTERM
        assert process.wait(30) == 128 + last
        assert process.stdout.read() == ""


def test_a_first_rank_that_has_ended_gets_no_signal(monkeypatch):
    monkeypatch.setattr(ranks, "GRACE", 0.05)
    made: Any = dist
    store = made.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mesh: Any = SimpleNamespace(rank=1, other_store=lambda: store)
    assert not _passed_on(mesh, signal.SIGTERM)
    store.set("lives-signal", "")
    assert _passed_on(mesh, signal.SIGTERM)
