"""Files that are there whole or not at all: written beside, made durable, renamed into place."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from gspo.core.errors import RunError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def names_a_folder(text: Any) -> bool:
    """Whether a value can be the name of a folder: no path, no half character, not too long.

    >>> names_a_folder("val"), names_a_folder("a/b"), names_a_folder("..")
    (True, False, False)
    """
    if not isinstance(text, str) or text in ("", ".", "..") or set(text) & set("/\\\0"):
        return False
    return not any(0xD800 <= ord(letter) < 0xE000 for letter in text) and len(text.encode()) < 256


def strict_json(
    value: Any, *, indent: int | None = None, default: Callable[[Any], Any] | None = None
) -> str:
    """JSON that any reader takes: a number that is not finite is written as null.

    >>> strict_json({"loss": float("nan"), "steps": [1, float("inf")]})
    '{"loss": null, "steps": [1, null]}'
    """
    try:
        return json.dumps(value, indent=indent, default=default, allow_nan=False)
    except ValueError:  # rare: only these are written twice
        text = json.dumps(value, default=default)
        finite = json.loads(text, parse_constant=lambda name: None)
        return json.dumps(finite, indent=indent, allow_nan=False)


def read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty if there is none, or something else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a start after a power cut, sees the old one or the new one.

    Raises:
        RunError: it cannot be written. The old one is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as building:
        building.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path`, for a file or a folder that takes its place when the block ends.

    Raises:
        RunError: it cannot be written. What was begun is removed, and `path` is as it was.
    """
    building = _beside(path)
    with explained(path):
        try:
            remove(building)
            yield building
            for part in (*building.rglob("*"), building) if building.is_dir() else (building,):
                _sync(part)
            if building.is_dir():  # it can be renamed over an empty folder only
                remove(path)
            os.replace(building, path)
            _sync(path.parent)
        except BaseException:
            with suppress(OSError):
                remove(building)
            raise


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an error of the file system into a `RunError` that names the path and the remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors raises no OSError
        told = f"(os error {getattr(error, 'errno', None)}) {error}"
        full = any(f"(os error {number})" in told for number in _FULL)
        why = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
        remedy = (
            "Free some space; what was there before is intact" if full else "Choose another path"
        )
        raise RunError(f"cannot write {path}: {why}. {remedy}") from None


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there. No half folder stays under its name."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    doomed = path if path.name.endswith(".tmp") else _beside(path.with_name(f"{path.name}.old"))
    if doomed != path:
        os.rename(path, doomed)
    shutil.rmtree(doomed)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _sync(path: Path) -> None:
    """Have the disk keep a file's content, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have none
            raise
    finally:
        os.close(handle)
