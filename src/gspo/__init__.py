"""gspo: reinforcement learning of language models with sequence-level importance ratios.

    import gspo as art

`__init__.pyi` has the names, and where each is. It is looked up when it is first used: importing
gspo is light.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from gspo import absent
from gspo import train as _room  # noqa: F401  # so that the function below is there

# A waiting OpenMP thread that spins costs a small model up to 27 x when a core is taken. Read by
# the OpenMP runtime when torch is first imported; a value that the user has set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Arrow's own allocator keeps 17 MB for a batch of 1 MB. Read when pyarrow is first imported.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

__version__ = "0.1.0"

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOMES = {
    name.name: str(line.module)
    for line in _STUB.body
    if isinstance(line, ast.ImportFrom)
    for name in line.names
}
"""Public name -> module that has it."""
_ARTS = {"local", "mcp", "metrics", "utils"}
"""Modules under ART's names, which `import *` leaves out."""
__all__ = sorted({"__version__", *_HOMES} - _ARTS)  # pyright: ignore[reportUnsupportedDunderAll]


class _Callable(ModuleType):
    """The package `gspo.train`, which is also a function: `art.train(...)`."""

    def __call__(self, **options: Any) -> Any:
        from gspo.experiment.whole_run import train

        return train(**options)


sys.modules["gspo.train"].__class__ = _Callable


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise absent.refusal("gspo", name, "gspo", __all__)
    if home == "gspo":
        return importlib.import_module(f"gspo.{name}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return __all__
