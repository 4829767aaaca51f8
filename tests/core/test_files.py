from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from gspo.core.errors import RunError
from gspo.core.files import remove, replacing, strict_json, write_whole


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_numbers_that_are_not_finite_are_null():
    value = {"a": [float("nan"), 1.5], "b": (float("-inf"), {"c": float("inf")}), "d": 10**400}
    assert strict_json(value) == '{"a": [null, 1.5], "b": [null, {"c": null}], "d": 1%s}' % (
        "0" * 400
    )
    text = strict_json({"x": float("nan"), "y": Path("z")}, indent=1, default=str)
    assert text == '{\n "x": null,\n "y": "z"\n}'
    with pytest.raises(TypeError):
        strict_json({"x": object()})


def test_a_file_is_replaced_whole(tmp_path: Path):
    path = tmp_path / "a.json"
    write_whole(path, "é")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == {"a.json"}


def test_a_folder_is_replaced_whole(tmp_path: Path):
    for name in ("one", "two"):
        with replacing(tmp_path / "f") as building:
            building.mkdir()
            (building / name).touch()
    assert names(tmp_path / "f") == {"two"}
    assert names(tmp_path) == {"f"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
        SafetensorError("Error while serializing: I/O error: quota (os error 122)"),
    ],
    ids=["python", "safetensors", "quota"],
)
def test_a_full_disk_is_named_and_leaves_what_was_there(error: Exception, tmp_path: Path):
    path = tmp_path / "a"
    write_whole(path, "old")
    with pytest.raises(RunError, match=r"cannot write .*/a: the disk is full\. Free some space"):  # noqa: SIM117
        with replacing(path) as building:
            building.mkdir()
            (building / "half").write_text("x")
            raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == {"a"}


def test_a_folder_in_the_place_of_a_file_is_not_deleted(tmp_path: Path):
    (tmp_path / "a" / "mine").mkdir(parents=True)
    with pytest.raises(RunError, match=r"cannot write .*Is a directory"):
        write_whole(tmp_path / "a", "x")
    assert (tmp_path / "a" / "mine").exists()
    assert names(tmp_path) == {"a"}


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117
        with replacing(tmp_path / "a") as building:
            building.touch()
            raise KeyboardInterrupt
    assert names(tmp_path) == set()


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    with replacing(tmp_path / "f") as building:
        building.mkdir()
        (building / "x").write_text("x")
    inodes = [p.stat().st_ino for p in (tmp_path / "f" / "x", tmp_path / "f", tmp_path)]
    assert events == [*inodes[:2], "rename", inodes[2]]


def test_links_are_removed_and_what_they_lead_to_stays(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    remove(tmp_path / "link")
    remove(tmp_path / "link")
    assert names(tmp_path) == {"real"}
    remove(tmp_path / "real")
    assert names(tmp_path) == set()


def test_strict_json_is_the_json_of_others(tmp_path: Path):
    value = {"a": [1, 2.5, None, True, "x\ud800"], "b": {"c": -0.0}}
    assert strict_json(value) == json.dumps(value)
