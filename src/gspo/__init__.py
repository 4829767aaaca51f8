"""gspo: reinforcement learning of language models with sequence-level importance ratios.

    import gspo as art

Names that load torch or openai are resolved when they are first used: importing gspo is light.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gspo import absent, dev
from gspo import train as _room  # noqa: F401  # so that the function below is there
from gspo.config import TrainConfig, TrainSFTConfig
from gspo.core import errors
from gspo.core.errors import GspoError

# A waiting OpenMP thread that spins costs a small model up to 27 x when a core is taken. Read by
# the OpenMP runtime when torch is first imported; a value that the user has set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from gspo import langgraph, objective, rewards
    from gspo import local as local
    from gspo import mcp as mcp
    from gspo import metrics as metrics
    from gspo import utils as utils
    from gspo.backend.base import Backend, TrainResult
    from gspo.backend.fake import FakeBackend
    from gspo.backend.local import LocalBackend
    from gspo.capture import (
        auto_trajectory,
        capture_auto_trajectory,
        capture_yielded_trajectory,
        trajectory,
        yield_trajectory,
    )
    from gspo.experiment.whole_run import train as train
    from gspo.gather import (
        gather_trajectories,
        gather_trajectory_groups,
        retry,
        trajectory_group_batches,
    )
    from gspo.model import Model, TrainableModel
    from gspo.serve.engine import Engine
    from gspo.serve.fake_engine import FakeEngine
    from gspo.train.algorithms import register_algorithm
    from gspo.trajectories import (
        History,
        Messages,
        MessagesAndChoices,
        Tools,
        Trajectory,
        TrajectoryGroup,
    )

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "Engine",
    "FakeBackend",
    "FakeEngine",
    "GspoError",
    "History",
    "LocalBackend",
    "Messages",
    "MessagesAndChoices",
    "Model",
    "Tools",
    "TrainConfig",
    "TrainResult",
    "TrainSFTConfig",
    "TrainableModel",
    "Trajectory",
    "TrajectoryGroup",
    "__version__",
    "auto_trajectory",
    "capture_auto_trajectory",
    "capture_yielded_trajectory",
    "dev",
    "errors",
    "gather_trajectories",
    "gather_trajectory_groups",
    "langgraph",
    "objective",
    "register_algorithm",
    "retry",
    "rewards",
    "train",
    "trajectory",
    "trajectory_group_batches",
    "yield_trajectory",
]

_HOMES = {
    "backend.base": ("Backend", "TrainResult"),
    "backend.fake": ("FakeBackend",),
    "backend.local": ("LocalBackend",),
    "capture": (
        *("auto_trajectory", "capture_auto_trajectory", "capture_yielded_trajectory"),
        *("trajectory", "yield_trajectory"),
    ),
    "gather": (
        *("gather_trajectories", "gather_trajectory_groups", "retry", "trajectory_group_batches"),
    ),
    "langgraph": ("langgraph",),
    "local": ("local",),
    "mcp": ("mcp",),
    "metrics": ("metrics",),
    "model": ("Model", "TrainableModel"),
    "objective": ("objective",),
    "rewards": ("rewards",),
    "serve.engine": ("Engine",),
    "serve.fake_engine": ("FakeEngine",),
    "train.algorithms": ("register_algorithm",),
    "trajectories": (
        *("History", "Messages", "MessagesAndChoices", "Tools"),
        *("Trajectory", "TrajectoryGroup"),
    ),
    "utils": ("utils",),
}


class _Callable(ModuleType):
    """The package `gspo.train`, which is also a function: `art.train(...)`."""

    def __call__(self, **options: Any) -> Any:
        from gspo.experiment.whole_run import train

        return train(**options)


sys.modules["gspo.train"].__class__ = _Callable


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            module = importlib.import_module(f"gspo.{home}")
            return module if name == home else getattr(module, name)
    raise absent.refusal("gspo", name, absent.NAMES, __all__)


def __dir__() -> list[str]:
    return __all__
