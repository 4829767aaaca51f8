"""Errors of the user's rollout or task, shown with the lines of the user's code."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gspo
from gspo.core.errors import DataError, GspoError, RolloutError

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
        DataError: what it returned is refused, or a prompt is; the error says which prompt's.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not _in_library(f)]
        users = [frame for frame in frames if not frame.filename.startswith(_OURS)]
        place = f"the rollout of prompt {index} ({split}), after step {step}"
        if not users and isinstance(error, DataError):
            raise DataError(f"{place}: {error}") from error
        if not users or (users[-1] is not frames[-1] and not isinstance(error, GspoError)):
            raise
        lines = str(error).splitlines() or ["(without a text)"]
        text = [f"{place}, raised {type(error).__name__}: {lines[0]}", *lines[1:LINES]]
        if len(lines) > LINES:
            text.append("...")
        if (cause := error.__cause__) is not None:
            text += f"caused by {type(cause).__name__}: {cause}".splitlines()[:1]
        text += getattr(error, "__notes__", [])  # such as which reward, and which row
        text += [f"  {f.filename}, line {f.lineno}, in {f.name}: {f.line}" for f in users[-FRAMES:]]
        saved = f"Step {step} is saved" if step else "Nothing was trained yet"
        text.append(f"{saved}: mend it, and the same command goes on.")
        raise RolloutError("\n".join(text)) from error


def _in_library(frame: traceback.FrameSummary) -> bool:
    """Whether a frame lies in an installed package, in Python's own, or in no file."""
    name = frame.filename
    library = name.startswith(("<", *_LIBRARIES)) or "site-packages" in name
    return library and not name.startswith(_OURS)
