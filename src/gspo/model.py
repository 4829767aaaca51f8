"""`Model` and `TrainableModel`: a name, a backend, an OpenAI client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from openai import AsyncOpenAI
from pydantic import BaseModel, ConfigDict, PrivateAttr, field_validator

from gspo import absent, dev
from gspo.backend.base import Backend, TrainResult
from gspo.config import TrainConfig, TrainSFTConfig
from gspo.core.errors import ConfigError, DataError, RunError, check_whole, shown
from gspo.core.options import Options
from gspo.data.check import listed
from gspo.metrics import MetricsBuilder
from gspo.trajectories import Trajectory, TrajectoryGroup

UserConfig = TypeVar("UserConfig", bound=BaseModel | dict[str, Any] | None)


class Model(Options, Generic[UserConfig]):
    """A model that can be asked and logged: a prompted one, to compare trained ones with.

    Args:
        name, project: name the run folder, `<backend path>/<project>/<name>/`.
        config: anything of yours that rollouts need, as a pydantic model or a dict.
        inference_base_url, inference_api_key: where the model is served.
        inference_model_name: its name there, if not `name`.

    Raises:
        ConfigError: an argument is unknown, missing or of another type.
    """

    model_config = ConfigDict(frozen=False, arbitrary_types_allowed=True)

    refused: ClassVar[Mapping[str, str]] = absent.of_options("Model")
    trainable: ClassVar[bool] = False
    """Whether the model has weights that `train` updates."""

    name: str
    project: str
    config: UserConfig = None  # type: ignore[assignment]
    inference_base_url: str | None = None
    inference_api_key: str | None = None
    inference_model_name: str | None = None

    _backend: Any = PrivateAttr(default=None)
    _client: AsyncOpenAI | None = PrivateAttr(default=None)
    _builder: MetricsBuilder = PrivateAttr(default_factory=MetricsBuilder)
    _internal: dev.InternalModelConfig = PrivateAttr(default_factory=dev.InternalModelConfig)

    @field_validator("config", mode="wrap")
    @classmethod
    def _dict_stays_a_dict(cls, value: Any, handler: Callable[[Any], Any]) -> Any:
        """Leave a dict as it is if no class of config is named to make it into."""
        named = cls.model_fields["config"].annotation is not UserConfig
        return value if isinstance(value, dict) and not named else handler(value)

    @property
    def source(self) -> str | None:
        """The base model of a `TrainableModel`."""
        return None

    @property
    def internal_config(self) -> dev.InternalModelConfig:
        """How the model is loaded."""
        return self._internal

    @property
    def inference_name(self) -> str:
        """What to pass as `model=` to the OpenAI client."""
        return self.inference_model_name or self.name

    def get_inference_name(self, step: int | None = None) -> str:
        """`inference_name`, as ART spells it; with a step, the name of that step's weights.

        They are loaded when they are first asked for, beside the current ones. 0: the base model.

        Raises:
            ConfigError: no step, or the model is not trained here.
        """
        if step is None:
            return self.inference_name
        check_whole("step", step, 0)
        if not self.trainable:
            raise ConfigError(f"model {self.name!r} is not trained here, so it has no steps")
        return f"{self.inference_name}@{step}"

    async def get_step(self) -> int:
        """Calls of `train` so far, over the run's life; 0 of a model that is not trained."""
        return await self.backend().get_step(self) if self.trainable else 0  # pyright: ignore[reportArgumentType]

    def metrics_builder(self, context: str = "train") -> MetricsBuilder:
        """Collects what the next `log` writes too; see `gspo.metrics`.

        Raises:
            ConfigError: the context is not "train" or "eval".
        """
        return self._builder.of(context)

    def safe_model_dump(self, **options: Any) -> dict[str, Any]:
        """`model_dump` without your config, which may hold anything."""
        return super().model_dump(**options) | {"config": None}

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in absent.REASONS["a model"]:
                raise absent.refusal(type(self).__name__, name, "a model")
            return super().__getattr__(name)

    def backend(self) -> Backend:
        """The backend that the model is registered with.

        Raises:
            RunError: it is not registered.
        """
        if self._backend is None:
            raise RunError(
                f"model {self.name!r} is not registered: await model.register(backend) first"
            )
        return self._backend

    @absent.refusing
    async def register(self, backend: Backend) -> None:
        """Make the model known to a backend.

        Raises:
            ConfigError: an unknown argument, or no backend.
        """
        if isinstance(backend, type) or not hasattr(backend, "register"):
            raise ConfigError(f"register got {shown(backend)}: give a backend, art.LocalBackend()")
        await backend.register(self)  # pyright: ignore[reportArgumentType]
        self._backend = backend

    def openai_client(self) -> AsyncOpenAI:
        """A client for the model's own server.

        Raises:
            ConfigError: no `inference_base_url` or `inference_api_key`.
        """
        url, key = self.inference_base_url, self.inference_api_key
        if url is None or key is None:
            raise ConfigError(f"model {self.name!r} needs inference_base_url and inference_api_key")
        self._client = self._client or AsyncOpenAI(base_url=url, api_key=key)
        return self._client

    async def log(
        self,
        trajectories: Iterable[Trajectory | BaseException] | Iterable[TrajectoryGroup] | None = (),
        split: str = "val",
        *,
        metrics: Mapping[str, float] | None = None,
        step: int | None = None,
    ) -> None:
        """Write trajectories, and the means of their metrics, to the run under `split`.

        Args:
            trajectories: or groups of them; none, to log `metrics` alone. What
                `metrics_builder()` has collected is logged with them.
            split: such as `val`; names the folder of the trajectories, and begins the metrics.
            metrics: name -> number. One that is named as one of gspo's stands at
                `<split>/user/<name>`.
            step: of the run; None: the model's.

        Raises:
            GspoError: see `LocalBackend.log`.
        """
        if isinstance(trajectories, Mapping):
            raise DataError(f"log: give metrics by name, as metrics={shown(trajectories)}")
        items = listed(() if trajectories is None else trajectories)
        grouped = all(isinstance(item, TrajectoryGroup) for item in items)
        groups = items if grouped else [TrajectoryGroup(items)]
        backend, collected = self.backend(), self._builder.take()
        if isinstance(metrics, Mapping | None):  # else the backend refuses it
            metrics = {**collected, **(metrics or {})}
        try:
            await backend.log(self, groups, split, metrics, step)  # pyright: ignore[reportArgumentType]
        except BaseException:
            for name, value in collected.items():  # for the next call
                self._builder.add_metric(name, value)
            raise


class TrainableModel(Model[UserConfig], Generic[UserConfig]):
    """A model that a backend samples and trains.

    Args:
        name, project, config: as in `Model`.
        base_model: `embedded:<task>`, a folder in Hugging Face layout, or a hub id.
        _internal_config: precision, LoRA and context; see `dev.InternalModelConfig`.

    Raises:
        ConfigError: as `Model`.
    """

    trainable: ClassVar[bool] = True
    base_model: str

    def __init__(
        self,
        *,
        _internal_config: dev.InternalModelConfig | dict[str, Any] | None = None,
        **data: Any,
    ) -> None:
        super().__init__(**data)
        if _internal_config is not None:
            self._internal_config = _internal_config

    @property
    def source(self) -> str | None:
        return self.base_model

    @property
    def _internal_config(self) -> dev.InternalModelConfig:
        """`internal_config`, which may be set until the model is registered, as ART's users do."""
        return self._internal

    @_internal_config.setter
    def _internal_config(self, value: dev.InternalModelConfig | dict[str, Any]) -> None:
        if self._backend is not None:
            raise ConfigError(
                f"model {self.name!r} is registered, so it is loaded already: "
                "set _internal_config before register"
            )
        if isinstance(value, dict):
            value = dev.InternalModelConfig(**value)
        if not isinstance(value, dev.InternalModelConfig):
            raise ConfigError(f"_internal_config is {shown(value)}; give a dev.InternalModelConfig")
        self._internal = value

    @absent.refusing
    async def register(self, backend: Backend) -> None:
        """Load the model, or go on from its run's last checkpoint."""
        await super().register(backend)
        self.inference_base_url = getattr(backend, "base_url", lambda model: None)(self)
        self.inference_api_key = "gspo"

    def openai_client(self) -> AsyncOpenAI:
        """A client that samples from the current weights. Its choices carry token ids."""
        return self.backend().client(self)

    async def train(
        self,
        trajectory_groups: Iterable[TrajectoryGroup],
        config: TrainConfig | None = None,
        _config: dev.TrainConfig | None = None,
        verbose: bool = False,
        **options: Any,
    ) -> TrainResult:
        """Train on one rollout batch, log it, and save a checkpoint.

        Args:
            trajectory_groups: groups of at least two trajectories each.
            config: learning rate and KL weight.
            _config: everything else. `dev.TrainConfig(importance_sampling_level="sequence")` is
                GSPO with the paper's clip range and four minibatches; it is the default too.
            verbose: print the call's metrics.
            options: fields of either by keyword, and `save_checkpoint`.

        Raises:
            GspoError: see `LocalBackend.train`.
        """
        result = await self.backend().train(
            self, listed(trajectory_groups), config, _config, **options
        )
        return _told(result) if verbose else result

    async def train_sft(
        self,
        trajectories: Iterable[Trajectory],
        config: TrainSFTConfig | None = None,
        verbose: bool = False,
    ) -> TrainResult:
        """Supervised fine-tuning on the assistant's turns of given conversations: one step of the
        run, however many batches it has. Log it, and save a checkpoint.

        Args:
            trajectories: their messages and tools; rewards mean nothing here.
            config: learning rate, batches, epochs.
            verbose: print the call's metrics.

        Raises:
            GspoError: see `LocalBackend.train_sft`.
        """
        result = await self.backend().train_sft(self, listed(trajectories), config)
        return _told(result) if verbose else result

    async def delete_checkpoints(self, best_checkpoint_metric: str = "val/reward") -> None:
        """Delete all checkpoints but the latest and the one with the best metric."""
        await self.backend().delete_checkpoints(self, best_checkpoint_metric)


def _told(result: TrainResult) -> TrainResult:
    for name, value in result.metrics.items():
        print(f"{name} {value:.6g}")
    return result
