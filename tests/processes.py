"""The command line: in this process, where torch is loaded already, or as a process of its own."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from unittest.mock import patch

from gspo.cli import main

_WITHOUT_LAB = """
import shlex, sys
for name in ("matplotlib", "plotly", "scipy", "kaleido"):
    sys.modules[name] = None
from gspo.cli import main
for command in sys.argv[1:]:
    sys.argv = ["gspo", *shlex.split(command)]
    try:
        main()
    except SystemExit as left:
        print("exit status", left.code or 0, file=sys.stderr)
"""


def gspo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`gspo ARGUMENTS` as a process of its own: seconds more than `gspo_here`."""
    command = [sys.executable, "-m", "gspo.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def gspo_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`gspo ARGUMENTS` in this process.

    What `main` raises is raised here too, but for its exit status. So a traceback, which a process
    would print, fails the test.
    """
    out, err, status = io.StringIO(), io.StringIO(), 0
    command = ["gspo", *arguments]
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch.object(sys, "argv", command),
    ):
        try:
            main()
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else int(left.code is not None)
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


def gspo_without_lab(*commands: str) -> subprocess.CompletedProcess[str]:
    """Each `gspo COMMAND`, in one process where the libraries of the extra `lab` are not installed.

    Their exit statuses stand on stderr.
    """
    command = [sys.executable, "-c", _WITHOUT_LAB, *commands]
    return subprocess.run(command, capture_output=True, text=True)
