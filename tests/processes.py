"""The command line, in a process of its own or in this one."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

from gspo import cli

_WITHOUT_LAB = """
import sys
for name in ("matplotlib", "plotly", "scipy", "kaleido"):
    sys.modules[name] = None
from gspo.cli import main
for command in sys.argv[1:]:
    sys.argv = ["gspo", *command.split()]
    try:
        main()
    except SystemExit as end:
        print(end.code)
"""


def gspo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`gspo ARGUMENTS`."""
    command = [sys.executable, "-m", "gspo.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def without_lab(*commands: str) -> subprocess.CompletedProcess[str]:
    """Commands of `gspo`, in one process where the libraries of the extra `lab` are not installed.
    Prints the exit status of each.
    """
    command = [sys.executable, "-c", _WITHOUT_LAB, *commands]
    return subprocess.run(command, capture_output=True, text=True)


def gspo_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`gspo ARGUMENTS` in this process, where torch is loaded: 3 s less."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = mock.patch.object(sys, "argv", ["gspo", *arguments])
    with argv, redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
