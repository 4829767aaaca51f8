"""A failure in the user's own rollout or task, told by the user's own lines."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

import gspo
from gspo.core.errors import GspoError, RolloutError

FRAMES = 4
"""Innermost lines of the user's that are shown."""
LINES = 4
"""Lines of the exception's own text that are shown."""
_OURS = str(Path(gspo.__file__).parent) + os.sep
_LIBRARIES = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")})


def rollout_error(error: Exception, split: str, index: int, step: int) -> RolloutError | None:
    """What to tell of an exception in a rollout; None if it is a mistake in gspo itself.

    Args:
        error: that the rollout, or a task's own code, has raised.
        split, index: of the prompt.
        step: calls of `train` so far.
    """
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _in_library(f.filename)]
    users = [frame for frame in frames if not frame.filename.startswith(_OURS)]
    if not users or (users[-1] is not frames[-1] and not isinstance(error, GspoError)):
        return None
    what = type(error).__name__
    text = str(error).splitlines() or ["(without a text)"]
    more = ["..."] if len(text) > LINES else []
    lines = [
        f"the rollout of prompt {index} ({split}), after step {step}, raised {what}: {text[0]}",
        *text[1:LINES],
        *more,
    ]
    if error.__cause__ is not None:
        lines.append(f"caused by {type(error.__cause__).__name__}: {_first_line(error.__cause__)}")
    for frame in users[-FRAMES:]:
        lines.append(f"  {frame.filename}, line {frame.lineno}, in {frame.name}: {frame.line}")
    lines.append(f"Step {step} is saved: mend it, and the same command goes on from there.")
    if step == 0:
        lines[-1] = "Nothing was trained yet: mend it, and give the same command again."
    return RolloutError("\n".join(lines))


def _in_library(filename: str) -> bool:
    """Whether a frame lies in an installed package, in Python's own, or in no file."""
    if filename.startswith(_OURS):
        return False
    return filename.startswith(("<", *_LIBRARIES)) or "site-packages" in filename


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
