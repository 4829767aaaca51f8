"""Rows of files, of the `datasets` library and of memory; what is broken is named by its row."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo.core import rows
from gspo.core.errors import DataError, MissingDependencyError
from gspo.core.rows import read_rows

ROWS = [{"prompt": "a, b", "answer": "1"}, {"prompt": 'say "x"\ny', "answer": "007"}]


def test_the_formats_say_the_same(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    (tmp_path / "x.json").write_text(json.dumps(ROWS, indent=1))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text('prompt,answer\n"a, b",1\n"say ""x""\ny",007\n')
    for name in ("x.jsonl", "x.json", "x.parquet", "x.csv"):
        path = tmp_path / name
        assert read_rows(path) == {f"{path}, row {n}": row for n, row in enumerate(ROWS, 1)}
    assert read_rows(ROWS) == {"dataset[0]": ROWS[0], "dataset[1]": ROWS[1]}


def test_the_mark_that_some_editors_put_first_is_no_part_of_a_name(tmp_path: Path):
    (tmp_path / "x.csv").write_text("prompt\nhi\n", encoding="utf-8-sig")
    (tmp_path / "x.jsonl").write_text('{"prompt": "hi"}', encoding="utf-8-sig")
    for name in ("x.csv", "x.jsonl"):
        assert list(read_rows(tmp_path / name).values()) == [{"prompt": "hi"}]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda s: st.lists(s, max_size=3)
)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.dictionaries(st.text(), JSON, max_size=3), min_size=1, max_size=4))
def test_any_rows_come_back_from_jsonl(tmp_path_factory: Any, rows: list[dict]):
    path = tmp_path_factory.mktemp("rows") / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert list(read_rows(path).values()) == rows


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.jsonl", b'{"prompt": "a"}\n\n{"prompt"', r"x\.jsonl, row 3 is not JSON: Expecting ':'"),
        ("x.jsonl", b'{"prompt": "a"}\n5', r"x\.jsonl, row 2 is 5 \(int\); give an object"),
        ("x.jsonl", b"", r"x\.jsonl is empty"),
        ("x.jsonl", b"\xff\xfe{", "is not text in UTF-8"),
        ("x.csv", b"", r"x\.csv is empty"),
        ("x.csv", b"prompt,answer\n", r"x\.csv is empty: give a row for each prompt"),
        ("x.csv", b"prompt,answer\na,1\nb, c,2\n", r"x\.csv, row 2 has 3 values for 2 columns"),
        ("x.csv", b"prompt,prompt\na,1\n", "two columns have one name: prompt, prompt"),
        ("x.csv", b'prompt\n"a\n', "is not CSV in UTF-8: unexpected end of data"),
        ("x.csv", b"prompt\n\xff\n", "is not CSV in UTF-8"),
        ("x.json", b'[{"prompt": "a"},', r"x\.json is not JSON: Expecting value"),
        ("x.json", b'[{"prompt": "a"}, 5]', r"x\.json, row 2 is 5 \(int\); give an object"),
        ("x.xlsx", b"PK", r"x\.xlsx, row 1 is not JSON: .*; give \.jsonl, \.csv or \.parquet"),
        ("x.parquet", b"PAR", r"x\.parquet is not parquet"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, told: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("source", [5, {"prompt": "a"}, iter(())])
def test_what_is_no_dataset(source: Any):
    with pytest.raises(DataError, match=r"dataset is .*; give a path, a list of dicts"):
        read_rows(source)
    with pytest.raises(DataError, match=r"dataset\[1\] is 'b'"):
        read_rows([{}, "b"])


def test_options_of_the_library_mean_nothing_for_a_file(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text("{}")
    with pytest.raises(DataError, match="split and subset are of the `datasets` library"):
        read_rows(tmp_path / "x.jsonl", "test")
    with pytest.raises(DataError, match=r"there is no file .*no\.csv, in .* or beside"):
        read_rows(tmp_path / "no.csv")


def test_without_the_library_a_name_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    told = r"dataset = 'openai/gsm8k', which is no file, \(.*\) needs the package 'datasets'"
    with pytest.raises(MissingDependencyError, match=told):
        read_rows("openai/gsm8k")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A stand-in for `datasets`, and its calls; tests/core/test_rows.py has the real one below."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, subset: str | None, split: str) -> list[dict[str, str]]:
        calls.append((name, subset, split))
        assert Path(name).exists() != module.config.HF_HUB_OFFLINE  # no hub answers
        if split == "tset":
            raise ValueError('Unknown split "tset".\nmore')
        return ROWS

    def load_from_disk(name: str) -> Any:
        calls.append(("disk", name))
        return {"train": ROWS[:1], "test": ROWS[1:]}

    module = types.ModuleType("datasets")
    module.load_dataset, module.load_from_disk = load_dataset, load_from_disk  # pyright: ignore
    module.config = types.SimpleNamespace(HF_HUB_OFFLINE=False)  # pyright: ignore
    monkeypatch.setattr(rows, "hub_answers", lambda: False)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_names_and_folders_go_to_the_library(tmp_path: Path, library: list[tuple[Any, ...]]):
    assert list(read_rows("openai/gsm8k", "test", "main")) == [
        "openai/gsm8k (test), row 0",
        "openai/gsm8k (test), row 1",
    ]
    read_rows(tmp_path)
    (tmp_path / "dataset_dict.json").touch()
    assert list(read_rows(tmp_path, "test").values()) == ROWS[1:]
    on_disk = ("disk", str(tmp_path))
    assert library == [("openai/gsm8k", "main", "test"), (str(tmp_path), None, "train"), on_disk]
    told = r"`datasets` cannot load 'x' \(split 'tset'\): ValueError: Unknown split \"tset\"\.$"
    with pytest.raises(DataError, match=told):
        read_rows("x", "tset")


REAL = """
import sys, datasets
from pathlib import Path
from gspo.core.rows import read_rows
from gspo.core.errors import DataError
rows, here = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}], Path(sys.argv[1])
whole = datasets.Dataset.from_list(rows)
assert list(read_rows(whole).values()) == rows
whole.save_to_disk(here / "saved")
assert list(read_rows(here / "saved").values()) == rows
datasets.DatasetDict(train=whole, test=whole.select([0])).save_to_disk(here / "splits")
assert list(read_rows(here / "splits", "test").values()) == rows[:1]
(here / "folder").mkdir()
whole.to_parquet(here / "folder" / "train.parquet")
assert list(read_rows(here / "folder").values()) == rows
for source, split in (("folder", "tset"), ("splits", "tset")):
    try:
        read_rows(here / source, split)
    except DataError as error:
        assert "cannot load" in str(error), error
    else:
        raise AssertionError(source)
"""


@pytest.mark.slow
def test_the_library_itself(tmp_path: Path):
    pytest.importorskip("datasets", reason="pip install datasets")
    subprocess.run([sys.executable, "-c", REAL, str(tmp_path)], check=True)
