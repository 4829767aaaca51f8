"""Rows of a dataset: of a file, of what the `datasets` library loads, or from memory."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gspo.core.byname import optional
from gspo.core.errors import DataError, shown

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
        raise DataError(f"{name} is empty: it needs a row of JSON for each conversation or prompt")
    return found


def _in_memory(source: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(source, Mapping) or not isinstance(source, Sized):
        raise DataError(
            f"dataset is {shown(source)}; give a path, a list of dicts, or one split of a `Dataset`"
        )
    return ((f"dataset[{number}]", row) for number, row in enumerate(source))  # pyright: ignore


def _of_file(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file() and not path.exists():
        raise DataError(f"cannot read {path}: there is no such file in {path.absolute().parent}")
    read = {".csv": _csv, ".parquet": _parquet}.get(path.suffix, _jsonl)
    try:
        yield from ((f"{path}, row {number}", row) for number, row in read(path))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        kind = "parquet" if path.suffix == ".parquet" else "text in UTF-8"
        raise DataError(f"{path} is not {kind}: {error}") from None


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    # -sig: some editors begin a file with a mark.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, row {number} is not JSON: {error}") from None


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
            loaded = datasets.load_dataset(name, subset, split=split)
        rows = [*loaded]
    except Exception as error:  # of many kinds: of files, of the network, of the data
        why = (str(error).splitlines() or [""])[0]
        told = f"split {split!r}" + f", subset {subset!r}" * (subset is not None)
        kind = type(error).__name__
        raise DataError(f"`datasets` cannot load {name!r} ({told}): {kind}: {why}") from None
    return ((f"{name} ({split}), row {number}", row) for number, row in enumerate(rows))
