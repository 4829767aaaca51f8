"""Warnings at gspo's own lines are errors; deprecations and those of libraries, a list."""

from __future__ import annotations

import doctest
import subprocess
import sys
import tomllib
from pathlib import Path

import library_warnings

ROOT = Path(__file__).parent.parent

LIBRARY = """
import warnings
def old():
    warnings.warn("`old` goes with release 9", FutureWarning, stacklevel=2)
def odd():
    warnings.warn("odd", UserWarning)
"""
OWN = """
import warnings
def careless():
    warnings.warn("careless", UserWarning)
def outdated():
    warnings.warn("outdated", DeprecationWarning)
"""
TESTS = """
import library
from gspo_like.module import careless, outdated
def test_deprecated(): library.old()
def test_odd(): library.odd()
def test_own(): careless()
def test_own_deprecation(): outdated()
"""


def test_doctests() -> None:
    assert doctest.testmod(library_warnings).failed == 0


def test_only_warnings_of_our_own_fail(tmp_path: Path) -> None:
    filters = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]
    lines = [f.replace("gspo|", "gspo_like|") for f in filters["ini_options"]["filterwarnings"]]
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nfilterwarnings =\n" + "".join(f"    {entry}\n" for entry in lines)
    )
    (tmp_path / "conftest.py").write_text(
        "from library_warnings import Collector\n"
        "def pytest_configure(config): config.pluginmanager.register(Collector())\n"
    )
    (tmp_path / "library.py").write_text(LIBRARY)
    (tmp_path / "gspo_like").mkdir()
    (tmp_path / "gspo_like" / "module.py").write_text(OWN)
    (tmp_path / "test_it.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--disable-warnings", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert "1 failed, 3 passed" in done.stdout, done.stdout + done.stderr
    assert "FAILED test_it.py::test_own -" in done.stdout
    assert "DeprecationWarning, gspo_like/module.py: outdated" in done.stdout
    assert "1 x FutureWarning" in done.stdout and "`old` goes with release 9" in done.stdout
    assert "library.py: odd" in done.stdout
