"""Set up before anything of gspo or torch is imported."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import config, install_import_hook, jaxtyped
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from library_warnings import Collector

torch.set_num_threads(1)

# The shapes in the signatures are checked here, and cost nothing outside the tests. A module
# without shapes is left out: pyright checks its plain types, and its small functions are called
# for each turn.
TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "gspo"
SHAPED = [
    f"gspo.{room}.{path.stem}"
    for room in ("objective", "data", "kernels", "policy")
    for path in sorted((SOURCE / room).glob("*.py"))
    if "jaxtyping" in path.read_text(encoding="utf-8")
]


def outermost(function: Any, *, typechecker: Any, check: Callable[..., Any] = jaxtyped) -> Any:
    """Check a function, but none inside another one: it would be wrapped anew, for 4 ms, with each
    call of that."""
    inner = "<locals>" in getattr(function, "__qualname__", "")
    return function if inner else check(function, typechecker=typechecker)


jaxtyping.jaxtyped = lambda **options: partial(outermost, **options)
install_import_hook(SHAPED, "beartype.beartype")

settings.register_profile(
    "gspo",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("gspo")


CHECKED = {"objective", "data", "kernels", "policy"}
"""Rooms in whose tests the shapes are always checked: those that have tensors in their hands."""
SOMETIMES = {"train", "serve", "weights"}
"""Rooms whose tests call the same functions again and again: the shapes are checked in each fourth
test, since the checks take a third of their time. All other tests make whole runs, without them."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    room = item.path.relative_to(TESTS).parts[0]
    sometimes = room in SOMETIMES and zlib.crc32(item.nodeid.encode()) % 4 == 0
    config.update("jaxtyping_disable", not (room in CHECKED or sometimes))


@pytest.fixture
def unhooked() -> Iterator[None]:
    """Without the shape checks, which a user doesn't have: for errors that they would hide."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Collector())


@pytest.fixture
def group(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A group of this process alone."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
