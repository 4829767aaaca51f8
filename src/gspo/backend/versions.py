"""What computes here."""

from __future__ import annotations

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Version of Python and of the packages that a result depends on.

    >>> "torch" in versions()
    True
    """
    found = {"python": platform.python_version()}
    for name in ("gspo", "torch", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
