"""Errors of the user's own rollout or task, shown by the user's own lines."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gspo
from gspo.core.errors import GspoError, RolloutError

FRAMES = 4
"""How many of the user's innermost lines are shown."""
LINES = 4
"""How many lines of the exception's text are shown."""
_OURS = str(Path(gspo.__file__).parent) + os.sep
_LIBRARIES = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")})


@contextmanager
def users_errors(split: str, index: int, step: int) -> Iterator[None]:
    """Run the user's code in the block, and show what it raises by the user's lines.

    A call of `sys.exit` is an error too: it would end the run as if it had finished.

    Args:
        split, index: of the prompt.
        step: calls of `train` so far.

    Raises:
        RolloutError: the user's code raised. A mistake in gspo itself keeps its traceback.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        frames = [frame for frame in frames if not _in_library(frame.filename)]
        users = [frame for frame in frames if not frame.filename.startswith(_OURS)]
        if not users or (users[-1] is not frames[-1] and not isinstance(error, GspoError)):
            raise
        place = f"the rollout of prompt {index} ({split}), after step {step}"
        text = [f"{place}, raised {_told(error)}", *map(_line, users[-FRAMES:])]
        text.append(
            f"Step {step} is saved: mend it, and the same command goes on from there."
            if step
            else "Nothing was trained yet: mend it, and give the same command again."
        )
        raise RolloutError("\n".join(text)) from error


def _told(error: BaseException) -> str:
    """The exception's type, its text and its cause."""
    lines = str(error).splitlines() or ["(without a text)"]
    text = [f"{type(error).__name__}: {lines[0]}", *lines[1:LINES]]
    if len(lines) > LINES:
        text.append("...")
    if (cause := error.__cause__) is not None:
        first_line = (str(cause).splitlines() or [""])[0]
        text.append(f"caused by {type(cause).__name__}: {first_line}")
    return "\n".join(text)


def _line(frame: traceback.FrameSummary) -> str:
    return f"  {frame.filename}, line {frame.lineno}, in {frame.name}: {frame.line}"


def _in_library(filename: str) -> bool:
    """Whether a frame lies in an installed package, in Python's own, or in no file."""
    if filename.startswith(_OURS):
        return False
    return filename.startswith(("<", *_LIBRARIES)) or "site-packages" in filename
