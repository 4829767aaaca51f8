"""What an experiment is: a TOML file, of which each field can be overridden by key=value."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterable, Mapping
from os.path import expanduser
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from gspo import dev
from gspo.backend.trackers import TrackerName
from gspo.config import TrainConfig
from gspo.core.byname import beside
from gspo.core.errors import ConfigError, suggestion
from gspo.core.options import LARGEST_COUNT, TEMPERATURES, Options
from gspo.tasks import task_names


class SFT(Options, title="[sft]"):
    """Supervised fine-tuning on given conversations, before everything else."""

    data: str
    """JSONL, a row `{"messages": [...], "tools": [...]}`; its path is beside the TOML file."""
    epochs: int = Field(default=1, ge=1, le=LARGEST_COUNT)
    batch_size: int = Field(default=8, ge=1, le=LARGEST_COUNT)
    learning_rate: float | None = Field(default=None, gt=0, le=1)
    """Peak; it rises over the first tenth of the batches, then falls to 0. None: by the model's
    size."""


class Spec(Options, title="the run"):
    """One run: a model, a task or a rollout function, an objective, sizes and seeds.

    >>> Spec(task="sort").model
    'embedded:sort'
    """

    name: str = "run"
    """Names the run folder `<path>/<project>/<name>`."""
    project: str = "gspo"
    path: str = ".gspo"
    model: str = ""
    """`embedded:<task>`, a folder, or a hub id. Default: the task's embedded model."""
    task: str | None = None
    """`sort`, `reverse`, `add`, `chain`, `climb`, `reasoning-gym:<dataset>`, or `module:Class`: a
    `gspo.tasks.Task` of your own, in a file beside this one."""
    task_options: dict[str, Any] = Field(default_factory=dict)
    """Options of `chain`, of a reasoning-gym dataset, or of your own task's constructor."""
    rollout: str | None = None
    """`module:function` or `folder/file.py:function`, an
    `async def rollout(model, scenario) -> Trajectory` of your own. A module is looked for beside
    the TOML file, in the working directory, and among what is installed, in this order.
    Without it, the task's prompt is answered in one turn and scored."""
    rollout_timeout: float | None = Field(default=None, gt=0)
    """Seconds that each call of your rollout function may take. One that takes longer is cancelled,
    told in a warning, and left out of its group. None: no limit."""
    steps: int = Field(default=60, ge=1, le=LARGEST_COUNT)
    """Calls of `train` over the run's life; with [sft], its first step is the SFT."""
    prompts: int = Field(default=32, ge=1, le=LARGEST_COUNT)
    """Prompts per step."""
    completions: int = Field(default=16, ge=2, le=LARGEST_COUNT)
    """Rollouts per prompt, G."""
    dynamic_sampling: bool = False
    """DAPO's: groups with equal rewards are replaced by fresh prompts, in up to three rounds."""
    max_tokens: int | None = Field(default=None, ge=1, le=LARGEST_COUNT)
    """Longest completion. None: the task's own."""
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

    @field_validator("name", "project", "path")
    @classmethod
    def _names_a_folder(cls, value: str, info: ValidationInfo) -> str:
        if info.field_name != "path" and (value in (".", "..") or set(value) & set("/\\")):
            raise ValueError("it names one folder: leave dots, '/' and '\\' out")
        return folder_name(value)

    @model_validator(mode="before")
    @classmethod
    def _task_names_the_model(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("model") and data.get("task") in task_names():
            data = {**data, "model": f"embedded:{data['task']}"}
        return data

    @model_validator(mode="after")
    def _has_prompts_and_a_model(self) -> Spec:
        if self.task is None and self.rollout is None:
            raise ValueError("give a task, or a rollout = 'module:function'")
        if self.task is None and self.task_options:
            raise ValueError("task_options are given, but no task")
        if self.rollout is None and self.rollout_timeout is not None:
            raise ValueError("rollout_timeout limits a rollout function of yours: there is none")
        given = [name for name in ("max_tokens", "temperature") if self._differs(name)]
        if self.rollout is not None and given:
            raise ValueError(
                f"{given[0]} is decided by your rollout function: leave it out, "
                "and pass it to chat.completions.create there"
            )
        if self.dynamic_sampling and self.train.algorithm == "reinforce":
            raise ValueError(
                "dynamic_sampling drops groups with equal rewards, which algorithm='reinforce' "
                "learns from: leave one of the two out"
            )
        if not self.model:
            near = suggestion(self.task or "", task_names())
            raise ValueError(
                f"task = {self.task!r} is no built-in task, and only those have a model of their "
                f"own: give a model.{near}"
            )
        return self

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.path) / self.project / self.name

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


TABLES = {"train": dev.TrainConfig, "sft": SFT, "load": dev.InternalModelConfig}
"""The tables of a run's file."""


def folder_name(text: str) -> str:
    """A name or path of a folder, with `~` as the home folder.

    Raises:
        ValueError: nothing, a NUL, or half a character (a lone surrogate): no file name has these.
    """
    if not text or "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("no file name is empty, or has a NUL or half a character")
    return expanduser(text)


def read_spec(path: Path, overrides: Iterable[str] = ()) -> Spec:
    """A spec from a TOML file, with `key=value` overrides (dotted keys, TOML values).

    Raises:
        ConfigError: no such file, not TOML, or an unknown key or value.
    """
    return Spec(**named_beside(override(read_toml(path), overrides), path.parent))


_NAMES = ("task", "rollout", "algorithm", "train.algorithm")
"""Keys whose value may be the `module:name` of the user's own code."""


def named_beside(run: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The fields of a run; each `module:name` means the file of `folder`, if there is one.

    A comparison's keys may be dotted, or say `algorithm` for `train.algorithm`.
    """
    named = dict(run)
    for key, value in run.items():
        if key in _NAMES and isinstance(value, str):
            named[key] = beside(value, folder)
    if isinstance(run.get("train"), dict):
        named["train"] = named_beside(run["train"], folder)
    if isinstance(sft := run.get("sft"), dict) and isinstance(sft.get("data"), str):
        named["sft"] = sft | {"data": str(folder / expanduser(sft["data"]))}
    return named


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file says.

    Raises:
        ConfigError: no such file, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{path}: its brackets are nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML in UTF-8: {error}") from None


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of options with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def full_keys(name: str) -> list[str]:
    """The dotted keys of a run's fields of this name: in the run itself, and in its tables.

    >>> full_keys("steps"), full_keys("epsilon"), full_keys("seed")
    (['steps'], ['train.epsilon'], ['seed', 'train.seed'])
    """
    found = [name] if name in Spec.model_fields else []
    return found + [f"{table}.{name}" for table in TABLES if name in TABLES[table].model_fields]


def override(
    data: dict[str, Any], overrides: Iterable[str], keys: Collection[str] = Spec.model_fields
) -> dict[str, Any]:
    """`data` with each `a.b=value` put in its place; `keys` are their possible first parts.

    >>> override({"train": {"epochs": 1}}, ["train.epochs=2", "model=embedded:sort"])
    {'train': {'epochs': 2}, 'model': 'embedded:sort'}
    """
    for item in overrides:
        key, equals, text = map(str.strip, item.partition("="))
        if not equals:
            raise ConfigError(f"--set {item!r}: write key=value")
        first, *rest = parts = key.split(".")
        near = [full for full in full_keys(parts[-1]) if full.partition(".")[0] in keys]
        misplaced = len(rest) == 1 and first in TABLES and near and key not in near
        if first not in keys or misplaced:
            hint = f" Did you mean {near[0]!r}?" if near else suggestion(first, keys)
            raise ConfigError(f"--set {item!r}: unknown key {key!r}.{hint}")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):  # no TOML: it is the text itself
            value = text
        data = put(data, parts, value)
    return data


def put(table: Any, keys: list[str], value: Any) -> dict[str, Any]:
    """A copy of the table, with the value at the keys. What is no table is replaced by one.

    >>> put({"steps": 5, "train": {"epochs": 2}}, ["train", "seed"], 1)
    {'steps': 5, 'train': {'epochs': 2, 'seed': 1}}
    """
    table = table if isinstance(table, dict) else {}
    first, *rest = keys
    return table | {first: put(table.get(first), rest, value) if rest else value}
