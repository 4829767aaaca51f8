"""TensorBoard, Weights & Biases and Trackio, through their own clients.

A tracker gets what metrics.jsonl gets: the same names at the same steps. No run ends because of
one: what a client raises is a warning, once.

An adapter is a class that is made with the run, the step at which it goes on, and the config. What
it shows of later steps was logged by a killed process and is logged again; without a step, the
steps are the caller's (a prompted model). It has `configure` (the whole config, when there is more
of it), `log` and `finish`. Any of them may raise.
"""

from __future__ import annotations

import contextvars
import importlib.util
import json
import logging
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from gspo.core.errors import ConfigError, MissingDependencyError, suggestion
from gspo.core.files import write_whole

if TYPE_CHECKING:
    from gspo.backend.run import Run

log = logging.getLogger("gspo")

TrackerName = Literal["tensorboard", "trackio", "wandb"]
Config = dict[str, Any]


class TensorBoard:
    """Event files in `<run>/tensorboard`, written through at every call."""

    def __init__(self, run: Run, step: int | None, config: Config):
        from torch.utils.tensorboard import SummaryWriter

        purge = None if step is None else step + 1
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)
        self._step = step or 0
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

    def __init__(self, run: Run, step: int | None, config: Config):
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
    """Offline if W&B would ask for a key; else as the user's settings say."""
    if wandb.setup().settings.mode != "online" or wandb.run is not None:
        return None
    return None if wandb.login(prompt=False, verify=False) else "offline"


class Trackio:
    """A Trackio run, which is known by project and name."""

    def __init__(self, run: Run, step: int | None, config: Config):
        self._project, self._name = run.project, run.name
        self._open(config, resume="allow" if run.metrics() else "never")

    def _open(self, config: Config, resume: str) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        # In a new context: in the caller's, it would end the run of another model.
        self._run: Any = contextvars.Context().run(
            trackio.init,
            self._project,
            name=self._name,
            resume=resume,
            config=config,
            embed=False,
        )

    def configure(self, config: Config) -> None:
        # A config is taken when a run is opened, and at no other time.
        self._run.finish()
        self._open(config, resume="allow")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self) -> None:
        self._run.finish()


_ADAPTERS: dict[TrackerName, Any] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}


def check_loggers(names: Sequence[TrackerName]) -> tuple[TrackerName, ...]:
    """The trackers of `logger=[...]`, each once.

    Raises:
        ConfigError: not a list, or an unknown name.
        MissingDependencyError: a client that is not installed.
    """
    if isinstance(names, str):
        raise ConfigError(f"logger = {names!r}: give a list, [{names!r}]")
    for name in names:
        if name not in _ADAPTERS:
            choices = ", ".join(map(repr, _ADAPTERS))
            hint = suggestion(str(name), _ADAPTERS)
            raise ConfigError(f"logger: unknown tracker {name!r}.{hint} Known: {choices}.")
        module = importlib.util.find_spec(name)
        # A folder named wandb/, which the client leaves behind, is a module without an origin.
        if module is None or module.origin is None:
            raise MissingDependencyError(name, name, f"logger = [{name!r}]")
    return tuple(dict.fromkeys(names))


class Trackers:
    """The trackers of one run. A call that fails is a warning the first time, and nothing more."""

    def __init__(self, names: Iterable[TrackerName], run: Run, step: int | None, config: Config):
        self._config = config
        self._warned: set[str] = set()
        self._open: dict[str, TensorBoard | Trackio | Wandb] = {}
        for name in names:
            with self._warning(name, "start"):
                self._open[name] = _ADAPTERS[name](run, step, dict(config))

    def configure(self, section: str, values: Config) -> None:
        """Add a section to the config, unless it is there already."""
        if section not in self._config:
            self._config[section] = values
            for name, tracker in self._open.items():
                with self._warning(name, "take the config"):
                    tracker.configure(dict(self._config))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show what a line of metrics.jsonl gains."""
        for name, tracker in self._open.items():
            with self._warning(name, "log"):
                tracker.log(step, metrics)

    def finish(self) -> None:
        """Let the clients write what they still hold."""
        for name, tracker in self._open.items():
            with self._warning(name, "finish"):
                tracker.finish()
        self._open.clear()

    @contextmanager
    def _warning(self, name: str, what: str) -> Iterator[None]:
        """Turn what a client raises into a warning, the first time."""
        try:
            yield
        except Exception as error:
            if name not in self._warned:
                self._warned.add(name)
                log.warning(
                    "%s could not %s: %s: %s. The run goes on; metrics.jsonl has every step. "
                    "This is said once",
                    *(name, what, type(error).__name__, error),
                )
