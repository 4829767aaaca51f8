"""The command line as a process of its own."""

from __future__ import annotations

import subprocess
import sys

_WITHOUT_LAB = """
import sys
for name in ("matplotlib", "plotly", "scipy", "kaleido"):
    sys.modules[name] = None
from gspo.cli import main
main()
"""


def gspo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`gspo ARGUMENTS`."""
    command = [sys.executable, "-m", "gspo.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def gspo_without_lab(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`gspo ARGUMENTS` where the libraries of the extra `lab` are not installed."""
    command = [sys.executable, "-c", _WITHOUT_LAB, *arguments]
    return subprocess.run(command, capture_output=True, text=True)
