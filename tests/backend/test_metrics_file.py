from __future__ import annotations

import errno
import json
import logging
import math
import os
from pathlib import Path

import pytest

from gspo.backend import metrics_file
from gspo.backend.metrics_file import MetricsFile, read_metrics
from gspo.core.errors import RunError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(path: Path) -> list[int]:
    return [line["step"] for line in lines(path)]


def full(*args) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_step_has_one_line_that_grows(path: Path):
    file = MetricsFile(path)
    for step, metrics in ((0, {"a": 1.0}), (1, {"a": 2.0}), (1, {"b": 3.0}), (0, {"c": 4.0})):
        file.put(step, metrics)
        assert MetricsFile(path).read() == file.read()
    file.put(2, {"a": 0.5})
    assert lines(path) == [
        {"step": 0, "a": 1.0, "c": 4.0},
        {"step": 1, "a": 2.0, "b": 3.0},
        {"step": 2, "a": 0.5},
    ]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_nan_is_null_in_the_file_and_nan_when_it_is_read(path: Path):
    MetricsFile(path).put(1, {"a": math.nan, "b": -math.inf})
    assert path.read_text() == '{"step": 1, "a": null, "b": null}\n'
    assert math.isnan(MetricsFile(path).read()[0]["a"])
    assert math.isnan(read_metrics(path)[0]["b"])


@pytest.mark.parametrize(
    "bad",
    [
        *(b"{", b"7", b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 100_000),
        *(b'{"step": "1"}', b'{"step": -1}', b'{"step": true}', b'{"step": 1.5}'),
        b'{"step": 2, "a": "x"}',
    ],
)
def test_a_bad_line_costs_no_other_and_is_kept_aside(path: Path, bad: bytes, caplog):
    good = [f'{{"step": {step}}}'.encode() for step in range(4)]
    content = b"\n".join([*good[:2], bad, *good[2:], b""])
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "gspo"):
        MetricsFile(path)
    assert steps(path) == [0, 1, 2, 3]
    assert (path.parent / "metrics.damaged.jsonl").read_bytes() == content
    assert [r.getMessage() for r in caplog.records] == [
        f"{path}: left out, not the metrics of a step: line 3. "
        "The file as it was is kept as metrics.damaged.jsonl"
    ]
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3]


def test_a_torn_last_line_is_dropped_without_a_word(path: Path, caplog):
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
    MetricsFile(path).put(2, {"a": 5.0})
    assert lines(path) == [{"step": 1, "a": 1}, {"step": 2, "a": 5.0}]
    assert not caplog.records


def test_a_last_line_without_its_end_is_kept(path: Path):
    path.write_text('{"step": 1}\n{"step": 2}')
    MetricsFile(path).put(3, {})
    assert steps(path) == [1, 2, 3]


def test_lines_that_two_processes_wrote_are_put_in_order(path: Path):
    path.write_text('{"step": 2}\n{"step": 1, "a": 1}\n{"step": 1, "b": 2}\n')
    MetricsFile(path)
    assert lines(path) == [{"step": 1, "a": 1, "b": 2}, {"step": 2}]


@pytest.mark.parametrize("written", [0, 1, 20, 45, 60])
def test_a_kill_in_the_midst_of_a_longer_last_line_loses_nothing(path: Path, written: int):
    file = MetricsFile(path)
    file.put(1, {"a": 1.0})
    file.put(2, {"a": 2.0})
    before = path.read_bytes()
    line = b'{"step": 2, "a": 2.0, "time/rollout": 12.5, "time/step": 25.0}\n'
    # As the file is when the process ends with so many bytes of the new line in place.
    old = before[file._last :]
    path.write_bytes(before[: file._last] + line[:written] + old[written:])
    (path.parent / ".metrics.jsonl.last").write_bytes(line)
    assert MetricsFile(path).read()[-1] == json.loads(line)
    assert lines(path) == [{"step": 1, "a": 1.0}, json.loads(line)]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_loses_no_line(path: Path, monkeypatch: pytest.MonkeyPatch):
    file = MetricsFile(path)
    file.put(1, {"a": 1.0})
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RunError, match=r"cannot write .*metrics\.jsonl: the disk is full"):
        file.put(2, {"a": 2.0})
    assert steps(path) == [1]
    with pytest.raises(RunError, match="the disk is full"):
        file.put(1, {"b": 2.0})
    assert MetricsFile(path).read() == [{"step": 1, "a": 1.0, "b": 2.0}]
    monkeypatch.setattr(metrics_file, "write_whole", full)
    with pytest.raises(OSError):
        MetricsFile(path).put(1, {"c": 2.0})
    assert lines(path) == [{"step": 1, "a": 1.0, "b": 2.0}]
    monkeypatch.undo()
    file.put(3, {"a": 3.0})  # the same process goes on
    file.put(3, {"b": 3.0})
    assert lines(path) == [{"step": 1, "a": 1.0, "b": 2.0}, {"step": 3, "a": 3.0, "b": 3.0}]


def test_short_writes_are_finished(path: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, place: real(fd, data[:7], place))
    file = MetricsFile(path)
    file.put(1, {"a": 1.0})
    file.put(1, {"b": 1.0})
    assert lines(path) == [{"step": 1, "a": 1.0, "b": 1.0}]


def test_a_line_that_is_not_on_the_disk_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.put(1, {"a": 1.0})
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="the disk is full"):
            file.put(2, {"a": 2.0})
    assert path.read_bytes() == before
    file.put(2, {"a": 3.0})
    assert [line["a"] for line in file.read()] == [1.0, 3.0]
