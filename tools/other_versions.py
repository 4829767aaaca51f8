"""Run the tests beside the lock: with the registry's newest packages, or with the lowest promised.

    python tools/other_versions.py newest            # or: make newest
    python tools/other_versions.py oldest tests/serve

Makes `.venv-newest` or `.venv-oldest` anew, runs the tests there, and prints which packages differ
from `requirements.lock` and which tests fail. torch stays what the lock says: a machine with a CPU
alone has one build of it. Exits as pytest does.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements.lock"
TOOLS = ("dev", "docs")
"""Extras that no user installs: their packages keep the lock's versions."""


def main(which: str, tests: list[str]) -> int:
    """Make the environment, run the tests in it, print what differs."""
    folder = ROOT / f".venv-{which}"
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "pip==26.3", "uv==0.13.9"], check=True)
    locked = read_lock(LOCK.read_text())
    pins = {"torch": locked["torch"]}
    with tempfile.TemporaryDirectory() as scratch:
        constraints = Path(scratch) / "constraints.txt"
        if which == "oldest":
            pins = locked | lowest(folder / "bin")
        constraints.write_text("".join(f"{name}=={pins[name]}\n" for name in pins))
        install = [python, "-m", "pip", "install", "-q", "-c", constraints]
        subprocess.run([*install, "torch"], check=True)
        subprocess.run([*install, "-e", ".[dev]"], cwd=ROOT, check=True)
        report = Path(scratch) / "report.xml"
        run = [python, "-m", "pytest", "-n", "2", "-q", f"--junitxml={report}", *tests]
        done = subprocess.run(run, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        print(f"\n{which}: packages that differ from the lock")
        for line in differences(locked, installed(python)):
            print(f"  {line}")
        failed = list(failures(report)) if report.exists() else ["pytest made no report"]
        print(f"{which}: {len(failed)} failures")
        for line in failed:
            print(f"  {line}")
    return done.returncode


def read_lock(text: str) -> dict[str, str]:
    """Versions by normalised name.

    >>> read_lock("Torch==2.13.0+cpu\\n    # via gspo\\nhuggingface-hub==2.4.0\\n")
    {'torch': '2.13.0', 'huggingface-hub': '2.4.0'}
    """
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;+]+)", text, re.MULTILINE)
    return {normal(name): version for name, version in found}


def lowest(tools: Path) -> dict[str, str]:
    """The lowest versions that users are promised, by uv's resolver; the others' newest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [f"--extra={name}" for name in project["optional-dependencies"] if name not in TOOLS]
    command = [tools / "uv", "pip", "compile", "-q", "--resolution=lowest-direct", *extras]
    command += ["-c", "constraints.txt", "--no-annotate", "--no-header", "pyproject.toml"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return read_lock(done.stdout)


def installed(python: Path) -> dict[str, str]:
    """Versions of an environment's packages, by normalised name."""
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    )
    return read_lock(listed.stdout)


def differences(locked: dict[str, str], here: dict[str, str]) -> Iterator[str]:
    """One line for each package of another version, or that the lock doesn't have.

    >>> list(differences({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "1"}))
    ['b 2 -> 3', 'c (not locked) -> 1']
    """
    for name, version in sorted(here.items()):
        before = locked.get(name, "(not locked)")
        if before != version and name not in ("gspo", "pip", "setuptools", "uv"):
            yield f"{name} {before} -> {version}"


def failures(report: Path) -> Iterator[str]:
    """The tests of a JUnit report that failed, with the first line of why."""
    for case in ElementTree.parse(report).iter("testcase"):
        for kind in ("failure", "error"):
            for found in case.iter(kind):
                why = (found.get("message") or "").splitlines()
                yield f"{case.get('classname')}.{case.get('name')}: {why[0] if why else kind}"


def normal(name: str) -> str:
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("newest", "oldest"):
        sys.exit("usage: python tools/other_versions.py newest|oldest [what pytest is to run]")
    sys.exit(main(sys.argv[1], sys.argv[2:]))
