from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from gspo import TrajectoryGroup
from gspo.backend.run import Run, in_use
from gspo.backend.stored_batch import write_batch
from gspo.core.errors import RunError
from gspo.train.observe import Trace
from support import choice, trajectory

IDENTITY = {"base_model": "embedded:sort"}


@pytest.fixture
def run(tmp_path: Path):
    run = Run(tmp_path, "p", "m", IDENTITY)
    run.claim()
    yield run
    run.close()


def lines(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_one_line_a_step_however_often_it_is_logged(run: Run):
    run.log(0, {"val/reward": 0.1})
    run.log(1, {"a": 1.0})
    run.log(1, {"b": 2.0})
    run.log(0, {"c": 3.0})
    assert lines(run) == [
        {"step": 0, "val/reward": 0.1, "c": 3.0},
        {"step": 1, "a": 1.0, "b": 2.0},
    ]


def test_a_torn_last_line_is_dropped(run: Run, tmp_path: Path):
    run.log(1, {"a": 1.0})
    run.close()
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "a"')
    again = Run(tmp_path, "p", "m", IDENTITY)
    again.log(2, {"a": 5.0})
    assert lines(again) == [{"step": 1, "a": 1.0}, {"step": 2, "a": 5.0}]
    again.close()


def test_lines_beyond_the_checkpoint_are_forgotten(run: Run, caplog: pytest.LogCaptureFixture):
    for step in range(4):
        run.log(step, {"a": float(step)})
    run.forget_after(2)
    assert [line["step"] for line in lines(run)] == [0, 1, 2]
    assert not caplog.records  # one line: killed between the log and the checkpoint
    run.forget_after(0)
    assert "the last 2 lines are of steps that have no checkpoint" in caplog.text


def test_another_base_model_is_refused_before_anything_is_written(run: Run, tmp_path: Path):
    run.log(1, {"a": 1.0})
    run.close()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.json*")}
    with pytest.raises(RunError, match=r"base_model 'embedded:sort', not 'embedded:add'.*another"):
        Run(tmp_path, "p", "m", {"base_model": "embedded:add"})
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.json*")} == before


def test_a_newer_run_is_refused(run: Run, tmp_path: Path):
    run.close()
    path = run.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(RunError, match="newer gspo"):
        Run(tmp_path, "p", "m", IDENTITY)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", "{}", '{"format": "1"}', '{"format": true}', "[" * 100_000]
)
def test_a_damaged_config_is_named(run: Run, tmp_path: Path, text: str):
    run.close()
    (run.folder / "config.json").write_text(text)
    for _ in range(2):  # the refused one has let go of the run
        with pytest.raises(RunError, match=r"config\.json is damaged.*delete the run or mend it"):
            Run(tmp_path, "p", "m", IDENTITY)


def test_files_of_another_kind_are_named(run: Run, tmp_path: Path):
    run.close()
    for name in ("config.json", "metrics.jsonl"):
        path = run.folder / name
        path.unlink(missing_ok=True)
        path.mkdir()
        with pytest.raises(RunError, match=rf"cannot read .*{name}"):
            Run(tmp_path, "p", "m", IDENTITY)
        path.rmdir()


def test_leftovers_of_killed_processes_are_removed(run: Run, tmp_path: Path):
    run.close()
    (run.folder / "trajectories" / "train").mkdir(parents=True)
    (run.folder / "checkpoints/.0003.old.7.tmp/inside").mkdir(parents=True)
    stays = {".run.png.7.tmp", ".metrics.jsonl.last", "checkpoints/notes.12.tmp"}
    goes = {
        *(".config.json.7.tmp", f".metrics.jsonl.{os.getpid()}.tmp", "checkpoints/.0001.7.tmp"),
        "trajectories/train/.0001.parquet.7.tmp",
        ".shared-0123456789abcdef",  # of ranks that were killed as they began
    }
    for name in stays | goes:
        (run.folder / name).touch()
    Run(tmp_path, "p", "m", IDENTITY).close()
    assert all((run.folder / name).exists() for name in stays)
    assert not any((run.folder / name).exists() for name in goes | {"checkpoints/.0003.old.7.tmp"})


def test_what_is_being_written_is_finished_before_another_process_has_the_run(run: Run):
    events: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def write() -> None:
        with run.writing():
            begun.set()
            go_on.wait(10)
            run.log(1, {"a": 1.0})
            events.append("written")

    writer = threading.Thread(target=write)
    writer.start()
    begun.wait(10)
    closer = threading.Thread(target=lambda: (run.close(), events.append("closed")))
    closer.start()
    closer.join(0.1)
    assert in_use(run.folder)
    go_on.set()
    for thread in (writer, closer):
        thread.join(10)
    assert events == ["written", "closed"]
    assert not in_use(run.folder)
    for late in (
        lambda: run.log(2, {"a": 1.0}),
        lambda: run.forget_after(0),
        lambda: run.prune(1, "val/reward"),
    ):
        with pytest.raises(RunError, match="is closed: nothing more is written"):
            late()
    assert [line["step"] for line in lines(run)] == [1]


def test_a_thread_that_writes_for_ever_is_named(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gspo.backend.run.WRITE_SECONDS", 0.05)
    begun, go_on = threading.Event(), threading.Event()

    def write() -> None:
        with run.writing():
            begun.set()
            go_on.wait(10)

    writer = threading.Thread(target=write)
    writer.start()
    begun.wait(10)
    for call in (run.close, lambda: run.log(1, {"a": 1.0})):
        with pytest.raises(RunError, match=f"writing to the run {run.folder} for 0 s"):
            call()
    go_on.set()
    writer.join(10)
    run.log(1, {"a": 1.0})
    assert [line["step"] for line in lines(run)] == [1]


def test_checkpoints_are_deleted_links_too_and_foreign_names_stay(run: Run, tmp_path: Path):
    for name in ("0001", "0003", "²", "0002.old"):
        (run.checkpoints / name / "inside").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (run.checkpoints / "0002").symlink_to(tmp_path / "elsewhere")
    run.prune(1, "val/reward")
    assert {path.name for path in run.checkpoints.iterdir()} == {"0003", "²", "0002.old"}
    assert (tmp_path / "elsewhere").exists()


def test_a_full_disk_at_the_trajectories_is_named(run: Run, monkeypatch: pytest.MonkeyPatch):
    def full(table, path: Path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(RunError, match=r"cannot write .*0003\.parquet: the disk is full"):
        write_batch(run.trajectories("train", 3), [TrajectoryGroup([trajectory(1.0)])])
    assert not list((run.folder / "trajectories" / "train").iterdir())


def test_numbers_that_are_not_finite_are_null_in_every_file(run: Run):
    run.log(1, {"a": float("nan")})
    assert lines(run) == [{"step": 1, "a": None}]
    odd = trajectory(1.0)
    odd.metrics["m"], odd.metadata["n"] = float("inf"), float("nan")
    path = run.trajectories("train", 1)
    write_batch(path, [TrajectoryGroup([odd])])
    row = pq.read_table(path).to_pylist()[0]
    assert (row["metrics"], row["metadata"]) == ('{"m": null}', '{"n": null}')


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "p").write_text("a file, where a folder is needed")
    with pytest.raises(RunError, match=r"cannot write .*Choose another path"):
        Run(tmp_path, "p", "m", IDENTITY)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="cannot write"):
        Run(tmp_path, "p", "m", IDENTITY)


@pytest.mark.parametrize("name", ["", "..", "a/b", "\ud800", "é" * 128])
def test_names_that_are_no_folder_names(tmp_path: Path, name: str):
    with pytest.raises(RunError, match="name of a folder"):
        Run(tmp_path, "p", name, IDENTITY)


def told_in_another_process(path: Path) -> str:
    """What a process is told that opens the run; nothing if it gets it."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        told = ""
        try:
            Run(path, "p", "m", IDENTITY)
        except RunError as error:
            told = str(error)
        os.write(writing, told.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return pipe.read()


def test_a_run_has_one_process_at_a_time(run: Run, tmp_path: Path):
    assert f"in use by process {os.getpid()}" in told_in_another_process(tmp_path)
    run.close()
    assert told_in_another_process(tmp_path) == ""


def test_trajectories_are_stored_with_tokens_and_advantages(run: Run):
    group = TrajectoryGroup([trajectory(1.0, choice([4, 5])), trajectory(0.0)])
    path = run.trajectories("train", 3)
    write_batch(path, [group], {0: 1.0, 1: -1.0})
    assert path == run.folder / "trajectories" / "train" / "0003.parquet"
    rows = pq.read_table(path).to_pylist()
    assert [row["reward"] for row in rows] == [1.0, 0.0]
    assert [row["advantage"] for row in rows] == [1.0, -1.0]
    assert rows[0]["token_ids"] == [[4, 5]]
    assert rows[0]["logprobs"] == [[-1.0, -1.0]]
    messages = json.loads(rows[0]["messages"])
    assert messages[1] == {"role": "assistant", "content": "x", "sampled": True}


def test_traces_are_stored_by_turn_and_null_where_there_is_none(run: Run):
    two_turns = trajectory(1.0, choice([4, 5]), choice([6, 7, 8], [1, 2, 3, 4, 5, 9]))
    groups = [TrajectoryGroup([trajectory(0.0)]), TrajectoryGroup([two_turns])]
    d = np.array([0.5, -0.25, 0.125, 0.0, -1.0], dtype=np.float32)
    trace = Trace(
        log_ratio=-0.125,
        advantage=1.0,
        length=5.0,
        trajectory_id=1,
        update=2,
        trained_tokens=5,
        clipped_tokens=5,
        token_log_ratios=d,
    )
    path = run.trajectories("train", 1)
    write_batch(path, groups, traces={1: [trace]})
    plain, traced = pq.read_table(path).to_pylist()
    assert traced["token_log_ratios"] == [[0.5, -0.25], [0.125, 0.0, -1.0]]
    assert traced["sequence_log_ratios"] == [-0.125]
    assert (traced["update"], traced["clipped_tokens"], traced["trained_tokens"]) == (2, [5], [5])
    for name in ("update", "sequence_log_ratios", "clipped_tokens", "token_log_ratios"):
        assert plain[name] is None


def test_whether_a_run_is_in_use_is_seen_from_outside(run: Run, tmp_path: Path):
    assert in_use(run.folder)
    run.close()
    assert not in_use(run.folder)
    assert not in_use(tmp_path / "nowhere")


def test_the_versions_of_the_first_process_stay(run: Run):
    stored = json.loads((run.folder / "config.json").read_text())
    assert {"python", "torch", "transformers"} <= set(stored["versions"])
