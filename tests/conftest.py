"""Set up before anything of gspo or torch is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import config, install_import_hook

from library_warnings import Collector

torch.set_num_threads(1)

# The shapes in the signatures are checked here, and cost nothing outside the tests.
ROOMS = ["gspo.objective", "gspo.data", "gspo.kernels", "gspo.policy"]
install_import_hook(ROOMS, "beartype.beartype")

settings.register_profile(
    "gspo",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("gspo")


@pytest.fixture
def unhooked() -> Iterator[None]:
    """Without the shape checks, which a user doesn't have: for errors that they would hide."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Collector())
