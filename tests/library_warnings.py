"""What libraries warn of during the tests: collected, and printed at the end as a list.

A warning at a line of gspo or of its tests is an error (pyproject.toml, filterwarnings), but for
DeprecationWarning, PendingDeprecationWarning and FutureWarning. A library raises these at the line
that called it, which is often ours, so they cannot be told from deprecations that gspo itself
raises; both are listed. A library's is news about its next release, not a failure: the list says
what to mend before that release comes.
"""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import PurePath

import pytest


def line(message: warnings.WarningMessage) -> str:
    """One line for one warning: its kind, the file that it comes from, and its first line.

    >>> note = warnings.WarningMessage("old\\nname", FutureWarning, "/x/site-packages/a/b.py", 7)
    >>> line(note)
    'FutureWarning, a/b.py: old'
    """
    parts = PurePath(message.filename).parts
    start = parts.index("site-packages") + 1 if "site-packages" in parts else -2
    first = (str(message.message).strip().splitlines() or [""])[0]
    return f"{message.category.__name__}, {'/'.join(parts[start:])}: {first}"


class Collector:
    """The plugin: pytest calls it for each warning, in the process that reports."""

    def __init__(self) -> None:
        self._collected: Counter[str] = Counter()

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage) -> None:
        self._collected[line(warning_message)] += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._collected:
            return
        terminalreporter.section("what libraries warn of (no failure)")
        for text, count in sorted(self._collected.items()):
            terminalreporter.write_line(f"{count:5d} x {text}")
