"""A machine on which gspo was never installed: its source, and carried wheels, put on the path.

Only the standard library is imported here: the rest may have to be found first.
"""

from __future__ import annotations

import atexit
import importlib
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / ".whl"
NEEDED = ("numpy", "pyarrow", "rich", "typer", "pydantic", "openai", "fastapi", "uvicorn")
"""What gspo imports besides torch. They are imported: each has needs of its own."""


def prepare(wheels: Path = WHEELS, needed: Iterable[str] = NEEDED) -> list[str]:
    """Put gspo's source and the wheels of packages that this machine lacks on `sys.path`.

    Nothing is downloaded: a wheel is an archive, and unpacking it is all that installing one means
    to an import. Returns the wheels that were used.

    Raises:
        SystemExit: a needed package cannot be imported: it, or what it needs, is neither installed
            nor among the wheels.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if (source := str(ROOT / "src")) not in sys.path:
        sys.path.insert(0, source)
    used = unpack(wheels)
    for name in needed:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise SystemExit(
                f"{name} cannot be imported: {error}. Wheels that were used of {wheels}: "
                f"{', '.join(used) or 'none'}. On a machine with a network, run `make gpu-wheels`, "
                "and bring that folder"
            ) from error
    return used


def unpack(wheels: Path) -> list[str]:
    """Unpack the wheels of packages that are not installed, to a folder first on the path."""
    used = [own for own in sorted(wheels.glob("*.whl")) if not _installed(own.name.split("-")[0])]
    if not used:
        return []
    target = tempfile.mkdtemp(prefix="gspo-wheels-")
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    for wheel in used:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    sys.path.insert(0, target)
    importlib.invalidate_caches()
    return [wheel.name for wheel in used]


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
