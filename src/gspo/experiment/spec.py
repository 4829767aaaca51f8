"""What an experiment is: a TOML file, of which each field can be overridden by key=value."""

from __future__ import annotations

from collections.abc import Mapping
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, field_validator, model_validator

from gspo import absent, dev
from gspo.backend.trackers import TrackerName
from gspo.config import TrainConfig
from gspo.core.errors import ConfigError, suggestion
from gspo.core.files import names_a_folder
from gspo.core.options import LARGEST_COUNT, TEMPERATURES, Options
from gspo.tasks import Task, load_task, task_names
from gspo.tasks.dataset import Data, load_dataset


class SFT(Options, title="[sft]"):
    """Supervised fine-tuning on given conversations, before everything else."""

    refused: ClassVar[Mapping[str, str]] = absent.of_options("TrainSFTConfig")

    data: str
    """JSONL, a row `{"messages": [...], "tools": [...]}`; its path is beside the TOML file."""
    epochs: int = Field(default=1, ge=1, le=LARGEST_COUNT)
    batch_size: int = Field(default=8, ge=1, le=LARGEST_COUNT)
    learning_rate: float | None = Field(default=None, gt=0, le=1)
    """Peak; it rises over the first tenth of the batches, then falls to 0. None: by the model's
    size."""


def folder_name(text: str) -> str:
    """A name that a folder can have; `~` is a name like any other.

    Raises:
        ValueError: nothing, a path, a NUL, half a character (a lone surrogate), or too long.
    """
    if not names_a_folder(text):
        raise ValueError("must name a folder: no '/', '\\', '..', half a character; 1 to 255 bytes")
    return text


def folder_path(text: str) -> str:
    """A path of a folder, with `~` as the home folder.

    Raises:
        ValueError: nothing, a NUL, or half a character (a lone surrogate): no file name has these.
    """
    if not text or "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("no file name is empty, or has a NUL or half a character")
    return expanduser(text)


FolderName = Annotated[str, AfterValidator(folder_name)]
FolderPath = Annotated[str, AfterValidator(folder_path)]


class Spec(Options, title="the run"):
    """One run: a model, a task or a rollout function, an objective, sizes and seeds.

    >>> Spec(task="sort").model
    'embedded:sort'
    """

    refused: ClassVar[Mapping[str, str]] = dev.TrainConfig.refused

    def __init__(self, **data: Any) -> None:
        for name in data.keys() - type(self).model_fields.keys() - self.refused.keys():
            within = [t for t, kind in TABLES.items() if suggestion(name, kind.model_fields, 0.8)]
            if within and not suggestion(name, type(self).model_fields, 0.8):
                near = suggestion(name, TABLES[within[0]].model_fields).rstrip("?")
                where = f"{' or '.join(within)}, as [{within[0]}] or {within[0]}={{...}}?"
                raise ConfigError(f"the run: unknown option {name!r}.{near} in {where}")
        super().__init__(**data)

    name: FolderName = "run"
    """Names the run folder `<path>/<project>/<name>`."""
    project: FolderName = "gspo"
    path: FolderPath = ".gspo"
    model: str = ""
    """`embedded:<task>`, a folder, or a hub id. Default: the task's embedded model."""
    task: str | None = None
    """`sort`, `reverse`, `add`, `chain`, `climb`, `reasoning-gym:<dataset>`, or `module:Class`: a
    `gspo.tasks.Task` of your own, in a file beside this one."""
    task_options: dict[str, Any] = Field(default_factory=dict)
    """Options of `chain`, of a reasoning-gym dataset, or of your own task's constructor."""
    dataset: str | None = None
    """Rows of your own, in place of a task: a file of JSONL, CSV or parquet beside this one; or a
    folder or a name that the `datasets` library loads."""
    reward: list[str] = Field(default_factory=list)
    """Reward functions for the dataset's rows, each `module:function`; see docs/own-data.md."""
    reward_weights: list[float] | None = None
    """One for each reward. None: each is 1."""
    data: Data = Field(default_factory=Data)
    """How the dataset is used: what is held out, epochs, order, system prompt."""
    rollout: str | None = None
    """`module:function` or `folder/file.py:function`, an
    `async def rollout(model, scenario) -> Trajectory` of your own. A module is looked for beside
    the TOML file, in the working directory, and among what is installed, in this order.
    Without it, the task's prompt is answered in one turn and scored."""
    rollout_timeout: float | None = Field(default=None, gt=0)
    """Seconds that each call of your rollout function, or an episode, may take. One that takes
    longer is cancelled, told in a warning, and left out of its group. None: no limit."""
    environment: str | None = None
    """`textworld:<game>` or another family's, or `module:Class`: a `gspo.environments.Environment`
    of your own. In place of a task."""
    environment_options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the environment's constructor."""
    max_turns: int | None = Field(default=None, ge=1, le=LARGEST_COUNT)
    """Most turns of the model in an episode. None: the environment's own."""
    step_timeout: float | None = Field(default=None, gt=0)
    """Seconds that a step of the environment may take. None: the environment's own."""
    steps: int = Field(default=60, ge=1, le=LARGEST_COUNT)
    """Calls of `train` over the run's life; with [sft], its first step is the SFT."""
    prompts: int = Field(default=32, ge=1, le=LARGEST_COUNT)
    """Prompts per step."""
    completions: int = Field(default=16, ge=2, le=LARGEST_COUNT)
    """Rollouts per prompt, G."""
    dynamic_sampling: bool = False
    """DAPO's: groups with equal rewards are replaced by fresh prompts, in up to three rounds."""
    pipeline: bool = False
    """Roll out for later steps while a step trains, `[train] max_staleness` steps ahead (None: 1).
    What is sampled then depends on timing: a run doesn't repeat exactly."""
    max_tokens: int | None = Field(default=None, ge=1, le=LARGEST_COUNT)
    """Longest completion, or turn. None: the task's or the environment's own."""
    temperature: float = Field(default=1.0, ge=TEMPERATURES[0], le=TEMPERATURES[1])
    eval_prompts: int = Field(default=256, ge=0, le=LARGEST_COUNT)
    """Held-out prompts before and after; 0 evaluates nothing."""
    eval_completions: int = Field(default=4, ge=1, le=LARGEST_COUNT)
    eval_every: int | None = Field(default=None, ge=1, le=LARGEST_COUNT)
    """Also evaluate each time after so many steps."""
    seed: int = 0
    """Of the prompts and of sampling."""
    keep_checkpoints: int | None = Field(default=2, ge=1, le=LARGEST_COUNT)
    checkpoint_every: int = Field(default=1, ge=1, le=LARGEST_COUNT)
    """Save one each time after so many steps, where an evaluation follows, and at the end."""
    engines: list[str] = Field(default_factory=list)
    """vLLM servers that sample (docs/vllm.md); empty: this process samples."""
    nproc: int | None = Field(default=None, ge=1, le=1024)
    """Processes that train one model together (docs/cluster.md). None: this one, or torchrun's."""
    cp_size: int = Field(default=1, ge=1)
    """Of these, how many divide a microbatch's tokens among them."""
    ep_size: int = Field(default=1, ge=1)
    """Of these, how many share one set of experts."""
    logger: list[TrackerName] = Field(default_factory=list)
    """Trackers that are shown the metrics too: `tensorboard`, `trackio`, `wandb`."""
    train: dev.TrainConfig = Field(default_factory=dev.TrainConfig)
    """The fields of `dev.TrainConfig`: algorithm, epsilon, minibatches, schedule, ..."""
    learning_rate: float | None = Field(default=None, gt=0, le=1)
    """Peak learning rate. None: by the model's size, with a warmup (docs/defaults.md)."""
    sft: SFT | None = None
    """Supervised fine-tuning as the run's first step."""
    load: dev.InternalModelConfig = Field(default_factory=dev.InternalModelConfig)
    """The fields of `dev.InternalModelConfig`: dtype, lora, activation_checkpointing, ..."""

    @field_validator("reward", mode="before")
    @classmethod
    def _one_reward(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _task_names_the_model(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("model") and data.get("task") in task_names():
            data = {**data, "model": f"embedded:{data['task']}"}
        return data

    @model_validator(mode="after")
    def _belongs_together(self) -> Spec:
        self._check_environment()
        self._check_prompts()
        self._check_dataset()
        return self

    def _check_environment(self) -> None:
        if self.environment is not None and (self.task or self.rollout or self.dataset is not None):
            raise ValueError(
                "an environment has its own prompts and rollout: leave task, dataset, rollout out"
            )
        for name in ("environment_options", "max_turns", "step_timeout"):
            if self.environment is None and getattr(self, name):
                raise ValueError(f"{name} is of an environment, but none is given")

    def _check_prompts(self) -> None:
        if not (self.task or self.rollout or self.dataset is not None or self.environment):
            raise ValueError(
                "give a task, a dataset, an environment, or a rollout = 'module:function'"
            )
        if self.task is None and self.task_options:
            raise ValueError("task_options are given, but no task")
        if self.rollout is None and self.environment is None and self.rollout_timeout is not None:
            raise ValueError("rollout_timeout limits a rollout function of yours: there is none")
        given = [name for name in ("max_tokens", "temperature") if self._differs(name)]
        if self.rollout is not None and given:
            raise ValueError(
                f"{given[0]} is decided by your rollout function: leave it out, "
                "and pass it to chat.completions.create there"
            )
        if self.pipeline and self.train.max_staleness == 0:
            raise ValueError(
                "pipeline rolls out ahead of training, and max_staleness = 0 trains on nothing "
                "that was: leave one of the two out, or give max_staleness = 1"
            )
        if self.dynamic_sampling and self.train.algorithm == "reinforce":
            raise ValueError(
                "dynamic_sampling drops groups with equal rewards, which algorithm='reinforce' "
                "learns from: leave one of the two out"
            )
        if not self.model:
            near = suggestion(self.task or "", task_names())
            raise ValueError(f"only a built-in task has a model of its own: give a model.{near}")

    def _check_dataset(self) -> None:
        if self.dataset is None:
            if self.reward or self.reward_weights or self.data != Data():
                raise ValueError("reward, reward_weights and [data] belong to a dataset: give one")
            return
        if self.task is not None:
            raise ValueError("task and dataset both give the prompts: leave one out")
        if (self.rollout is None) != bool(self.reward):
            raise ValueError(
                "a dataset needs reward = ['module:function'], or a rollout = 'module:function', "
                "which gives its own reward: one of the two"
            )
        if self.rollout and (self.data.system_prompt or self.data.chat_template_kwargs):
            raise ValueError(
                "the system prompt and chat_template_kwargs are decided by your rollout function: "
                "leave them out of [data], and use them there"
            )
        if self.data.epochs and ("steps" in self.model_fields_set or self.dynamic_sampling):
            raise ValueError(
                "data.epochs gives the number of steps: leave steps and dynamic_sampling out"
            )

    def make_task(self) -> Task | None:
        """The task or the dataset; None for a rollout without either.

        Raises:
            GspoError: it cannot be loaded, or a row or a reward is refused.
        """
        if self.dataset is None:
            return load_task(self.task, self.task_options) if self.task else None
        return load_dataset(self.dataset, self.reward, self.reward_weights, self.data)

    def with_steps(self, task: Task | None = None) -> Spec:
        """The spec with the number of steps in place of epochs, rounded up."""
        if self.data.epochs is None or not (task := task or self.make_task()) or not task.sizes:
            return self
        steps = -(-self.data.epochs * task.sizes["train"] // self.prompts) + bool(self.sft)
        data = self.data.model_copy(update={"epochs": None})  # both together are refused
        return self.model_copy(update={"steps": steps, "data": data})

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.path) / self.project / self.name

    @property
    def steps_ahead(self) -> int:
        """For how many later steps rollouts run while a step trains.

        >>> Spec(task="sort", pipeline=True).steps_ahead
        1
        """
        return (self.train.max_staleness or 1) if self.pipeline else 0

    def saves(self, step: int) -> bool:
        """Whether the weights of a step are saved.

        >>> spec = Spec(task="sort", steps=10, checkpoint_every=4, eval_every=3)
        >>> [step for step in range(1, 11) if spec.saves(step)]
        [3, 4, 6, 8, 9, 10]
        """
        every = (self.checkpoint_every, self.eval_every or self.steps, self.steps)
        return any(step % number == 0 for number in every)

    def train_config(self) -> TrainConfig:
        """The public half of the training options."""
        return TrainConfig(learning_rate=self.learning_rate)


TABLES = {"train": dev.TrainConfig, "sft": SFT, "load": dev.InternalModelConfig, "data": Data}
"""The tables of a run's file."""
