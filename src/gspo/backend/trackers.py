"""TensorBoard, Weights & Biases and Trackio, through their own clients.

A tracker gets what metrics.jsonl gets: the same names at the same steps. No run ends because of
one: what a client raises is a warning, once.
"""

from __future__ import annotations

import contextvars
import importlib.util
import json
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from gspo.core.errors import ConfigError, MissingDependencyError, suggestion
from gspo.core.files import write_whole

log = logging.getLogger("gspo")

TrackerName = Literal["tensorboard", "trackio", "wandb"]
Config = dict[str, Any]


@dataclass(frozen=True)
class Followed:
    """The run that a tracker shows.

    Attributes:
        folder: of the run.
        project, name: of the model.
        step: where the run goes on; what a tracker knows of later steps, a killed process logged
            and the resumed one will log again. None: steps are the caller's (a prompted model).
        begun: an earlier process has logged to the folder.
    """

    folder: Path
    project: str
    name: str
    step: int | None
    begun: bool


class Tracker(Protocol):
    """One client. It is made with the run and the config; any call may raise."""

    def configure(self, config: Config) -> None:
        """The whole config, once more is known of it."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def finish(self) -> None: ...


class TensorBoard:
    """Event files in `<run>/tensorboard`, written through at every call."""

    def __init__(self, run: Followed, config: Config):
        from torch.utils.tensorboard import SummaryWriter

        purge = None if run.step is None else run.step + 1
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)
        self._step = run.step or 0
        self.configure(config)

    def configure(self, config: Config) -> None:
        text = json.dumps(config, indent=1, default=str)
        self._writer.add_text("config", f"```json\n{text}\n```", self._step)
        self._writer.flush()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


class Wandb:
    """A W&B run whose id is kept in the run folder. Without a key it is written offline."""

    def __init__(self, run: Followed, config: Config):
        import wandb

        path = run.folder / "wandb-id"
        if not path.exists():
            write_whole(path, uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=path.read_text().strip(),
            resume="allow",
            dir=str(run.folder),
            config=config,
            mode=_wandb_mode(wandb),
            reinit="create_new",  # several models may train in one process
            settings=wandb.Settings(console="off", quiet=True),
        )
        # W&B's own step may not go back, but a val/* of an earlier step may come late.
        self._run.define_metric("*", step_metric="step")

    def configure(self, config: Config) -> None:
        self._run.config.update(config, allow_val_change=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def finish(self) -> None:
        self._run.finish()


def _wandb_mode(wandb: Any) -> Literal["offline"] | None:
    """Offline where W&B would ask for a key; else as the user's settings say."""
    if wandb.setup().settings.mode != "online" or wandb.run is not None:
        return None
    return None if wandb.login(prompt=False, verify=False) else "offline"


class Trackio:
    """A Trackio run; it is known by project and name."""

    def __init__(self, run: Followed, config: Config):
        self._followed = run
        self._run = self._open(config, resume="allow" if run.begun else "never")

    def _open(self, config: Config, resume: str) -> Any:
        import trackio  # pyright: ignore[reportMissingImports]

        def start() -> Any:
            return trackio.init(
                self._followed.project,
                name=self._followed.name,
                resume=resume,
                config=config,
                embed=False,
            )

        # In a context of its own: in the caller's, it would end the run of another model.
        return contextvars.Context().run(start)

    def configure(self, config: Config) -> None:
        # A config is taken when a run is opened, and at no other time.
        self._run.finish()
        self._run = self._open(config, resume="allow")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self) -> None:
        self._run.finish()


_TRACKERS: Mapping[TrackerName, Callable[[Followed, Config], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}


def check_loggers(names: Iterable[str]) -> tuple[TrackerName, ...]:
    """The trackers of `logger=[...]`, each once.

    Raises:
        ConfigError: not a list, or an unknown name.
        MissingDependencyError: a client that is not installed.
    """
    if isinstance(names, str):
        raise ConfigError(f"logger = {names!r}: give a list, [{names!r}]")
    known: dict[str, TrackerName] = {name: name for name in get_args(TrackerName)}
    found: list[TrackerName] = []
    for name in dict.fromkeys(names):
        if name not in known:
            choices = ", ".join(repr(choice) for choice in known)
            raise ConfigError(
                f"logger: unknown tracker {name!r}.{suggestion(str(name), known)} Known: {choices}."
            )
        module = importlib.util.find_spec(name)
        # A folder named wandb/, which the client leaves behind, is a module without an origin.
        if module is None or module.origin is None:
            raise MissingDependencyError(name, name, f"logger = [{name!r}]")
        found.append(known[name])
    return tuple(found)


class Trackers:
    """The trackers of one run. A call that fails is a warning the first time, and nothing more."""

    def __init__(
        self,
        names: Iterable[TrackerName] = (),
        run: Followed | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self._config = dict(config or {})
        self._warned: set[str] = set()
        self._open: dict[str, Tracker] = {}
        for name in names:
            assert run is not None
            try:
                self._open[name] = _TRACKERS[name](run, dict(self._config))
            except Exception as error:
                self._warn(name, "start", error)

    def configure(self, part: str, values: Config) -> None:
        """Add a part to the config, once."""
        if part not in self._config:
            self._config[part] = values
            self._each("take the config", lambda tracker: tracker.configure(dict(self._config)))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """What a line of metrics.jsonl gains."""
        self._each("log", lambda tracker: tracker.log(step, metrics))

    def finish(self) -> None:
        """Let the clients write what they still hold."""
        self._each("finish", lambda tracker: tracker.finish())
        self._open.clear()

    def _each(self, what: str, call: Callable[[Tracker], None]) -> None:
        for name, tracker in self._open.items():
            try:
                call(tracker)
            except Exception as error:
                self._warn(name, what, error)

    def _warn(self, name: str, what: str, error: Exception) -> None:
        if name not in self._warned:
            self._warned.add(name)
            log.warning(
                "%s could not %s: %s: %s. The run goes on; metrics.jsonl has every step. "
                "This is said once",
                name,
                what,
                type(error).__name__,
                error,
            )
