"""Rows of a dataset: of a file, of what the `datasets` library loads, or from memory."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sized
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq

from gspo.core.byname import optional
from gspo.core.errors import DataError, shown
from gspo.core.hub import hub_answers

Rows = dict[str, dict[str, Any]]
"""By where each stands, such as `data.jsonl, row 3`, which errors name; in their order."""
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_SAVED = ("state.json", "dataset_dict.json")
"""What `save_to_disk` of the `datasets` library leaves in a folder."""


def read_rows(source: Any, split: str = "train", subset: str | None = None) -> Rows:
    """The rows of a dataset. No code of it is run.

    Args:
        source: a file of JSONL (its row is its line), CSV (each value is a text) or parquet; a
            folder or a name that the `datasets` library loads; a list of dicts; or a `Dataset`.
        split, subset: of a folder or a name.

    Raises:
        DataError: it cannot be read, is empty, or a row is broken, which is named.
        MissingDependencyError: it is no file, and `datasets` is not installed.

    >>> read_rows([{"prompt": "312"}])
    {'dataset[0]': {'prompt': '312'}}
    """
    if not isinstance(source, str | Path):
        name, rows = "dataset", _in_memory(source)
    elif (path := Path(source)).is_file() or path.suffix in _SUFFIXES:
        if (split, subset) != ("train", None):
            raise DataError(f"split and subset are of the `datasets` library: {path} is a file")
        name, rows = str(path), _of_file(path)
    else:
        name, rows = str(source), _loaded(str(source), split, subset)
    found: Rows = {}
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise DataError(f"{where} is {shown(row)}; give an object: a value for each column")
        found[where] = dict(row)
    if not found:
        raise DataError(f"{name} is empty: give a row for each prompt or conversation")
    return found


def check_messages(messages: Any, where: str) -> None:
    """Refuse what is no conversation: each message needs a role, and a text or calls of tools.

    Raises:
        DataError: it names `where`, which is the row.
    """
    if not isinstance(messages, list):
        raise DataError(f"{where}: messages are {shown(messages)}; give a list of messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}, message {number} is {shown(message)}; it needs a role")
        content = message.get("content")
        if not isinstance(content, str | None) or (content is None and "tool_calls" not in message):
            raise DataError(f"{where}, message {number}: content is {shown(content)}; give a text")


def _in_memory(source: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(source, Mapping) or not isinstance(source, Sized):
        raise DataError(
            f"dataset is {shown(source)}; give a path, a list of dicts, or one split of a `Dataset`"
        )
    return ((f"dataset[{number}]", row) for number, row in enumerate(source))  # pyright: ignore


def _of_file(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file() and not path.exists():
        raise DataError(f"there is no file {path}, in {Path.cwd()} or beside the run's file")
    read = {".csv": _csv, ".parquet": _parquet}.get(path.suffix, _jsonl)
    try:
        yield from ((f"{path}, row {number}", row) for number, row in read(path))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, pa.ArrowException) as error:
        kind = {".parquet": "parquet", ".csv": "CSV in UTF-8", ".json": "JSON"}.get(path.suffix)
        raise DataError(f"{path} is not {kind or 'text in UTF-8'}: {error}") from None


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    # -sig: some editors begin a file with a mark.
    text = path.read_text(encoding="utf-8-sig")
    other = "" if path.suffix in _SUFFIXES else "; give .jsonl, .csv or .parquet"
    if path.suffix == ".json" and text.lstrip().startswith("["):
        text = "\n".join(map(json.dumps, json.loads(text)))  # a list of the rows
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, row {number} is not JSON: {error}{other}") from None


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}: two columns have one name: {', '.join(header)}")
        for number, values in enumerate(filter(None, reader), 1):
            if len(values) != len(header):
                raise DataError(
                    f"{path}, row {number} has {len(values)} values for {len(header)} columns: "
                    'quote a text that has a comma, as "a, b"'
                )
            yield number, dict(zip(header, values, strict=True))


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    return iter(enumerate(pq.read_table(path).to_pylist(), 1))


def _loaded(name: str, split: str, subset: str | None) -> Iterator[tuple[str, Any]]:
    needs = f"dataset = {name!r}, which is no file,"
    datasets = optional("datasets", "datasets", "datasets", needs)
    try:
        if any(Path(name, file).is_file() for file in _SAVED):
            loaded = datasets.load_from_disk(name)
            loaded = loaded[split] if isinstance(loaded, Mapping) else loaded
        else:
            offline = datasets.config.HF_HUB_OFFLINE or not (Path(name).exists() or hub_answers())
            with patch.object(datasets.config, "HF_HUB_OFFLINE", offline):  # else it asks for 20 s
                loaded = datasets.load_dataset(name, subset, split=split)
        rows = [*loaded]
    except Exception as error:  # of many kinds: of files, of the network, of the data
        why = (str(error).splitlines() or [""])[0]
        told = f"split {split!r}" + f", subset {subset!r}" * (subset is not None)
        kind = type(error).__name__
        raise DataError(f"`datasets` cannot load {name!r} ({told}): {kind}: {why}") from None
    return ((f"{name} ({split}), row {number}", row) for number, row in enumerate(rows))
