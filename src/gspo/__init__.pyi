"""The names of `import gspo as art` and where each is; __init__.py finds them by this list."""

from gspo import dev as dev
from gspo import langgraph as langgraph
from gspo import local as local
from gspo import mcp as mcp
from gspo import metrics as metrics
from gspo import objective as objective
from gspo import rewards as rewards
from gspo import utils as utils
from gspo.backend.base import Backend as Backend
from gspo.backend.base import TrainResult as TrainResult
from gspo.backend.cluster_backend import ClusterBackend as ClusterBackend
from gspo.backend.fake import FakeBackend as FakeBackend
from gspo.backend.local import LocalBackend as LocalBackend
from gspo.capture import auto_trajectory as auto_trajectory
from gspo.capture import capture_auto_trajectory as capture_auto_trajectory
from gspo.capture import capture_yielded_trajectory as capture_yielded_trajectory
from gspo.capture import trajectory as trajectory
from gspo.capture import yield_trajectory as yield_trajectory
from gspo.config import TrainConfig as TrainConfig
from gspo.config import TrainSFTConfig as TrainSFTConfig
from gspo.core import errors as errors
from gspo.core.errors import GspoError as GspoError
from gspo.experiment.whole_run import train as train
from gspo.gather import gather_trajectories as gather_trajectories
from gspo.gather import gather_trajectory_groups as gather_trajectory_groups
from gspo.gather import retry as retry
from gspo.gather import trajectory_group_batches as trajectory_group_batches
from gspo.model import Model as Model
from gspo.model import TrainableModel as TrainableModel
from gspo.serve.engine import Engine as Engine
from gspo.serve.fake_engine import FakeEngine as FakeEngine
from gspo.train.algorithms import register_algorithm as register_algorithm
from gspo.trajectories import History as History
from gspo.trajectories import Messages as Messages
from gspo.trajectories import MessagesAndChoices as MessagesAndChoices
from gspo.trajectories import Tools as Tools
from gspo.trajectories import Trajectory as Trajectory
from gspo.trajectories import TrajectoryGroup as TrajectoryGroup

__version__: str
__all__: list[str]  # pyright: ignore[reportUnsupportedDunderAll]
_HOMES: dict[str, str]
