"""TensorBoard, Weights & Biases and Trackio, through their own clients.

A tracker gets what metrics.jsonl gets: the same names at the same steps. No run ends because of
one: what a client raises is a warning, once.
"""

from __future__ import annotations

import contextvars
import importlib.util
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from gspo.core.errors import ConfigError, MissingDependencyError, suggestion
from gspo.core.files import write_whole
from gspo.core.log import log

if TYPE_CHECKING:
    from gspo.backend.run import Run

TrackerName = Literal["tensorboard", "trackio", "wandb"]
Config = dict[str, Any]


class Tracker(NamedTuple):
    """What is asked of a client. Each function may raise.

    Attributes:
        configure: show the whole config; called again when there is more of it.
        log: show metrics at a step.
        finish: write what the client still holds.
    """

    configure: Callable[[Config], object]
    log: Callable[[int, Mapping[str, float]], object]
    finish: Callable[[], object]


def _tensorboard(run: Run, step: int | None) -> Tracker:
    """Event files in `<run>/tensorboard`, written through at every call."""
    from torch.utils.tensorboard import SummaryWriter

    # What is shown of later steps was logged by a killed process and is logged again; without a
    # step, the steps are the caller's (a prompted model).
    purge = None if step is None else step + 1
    writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)

    def configure(config: Config) -> None:
        text = json.dumps(config, indent=1, default=str)
        writer.add_text("config", f"```json\n{text}\n```", step or 0)
        writer.flush()

    def log(step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(configure, log, writer.close)


def _wandb(run: Run, step: int | None) -> Tracker:
    """A W&B run whose id is kept in the run folder. Without a key it is written offline."""
    import wandb

    path = run.folder / "wandb-id"
    if not path.exists():
        write_whole(path, uuid.uuid4().hex[:12])
    shown = wandb.init(
        project=run.project,
        name=run.name,
        id=path.read_text().strip(),
        resume="allow",
        dir=str(run.folder),
        mode=_wandb_mode(wandb),
        reinit="create_new",  # several models may train in one process
        settings=wandb.Settings(console="off", quiet=True),
    )
    # W&B's own step may not go back, but a val/* of an earlier step may come late.
    shown.define_metric("*", step_metric="step")
    return Tracker(
        configure=lambda config: shown.config.update(config, allow_val_change=True),
        log=lambda step, metrics: shown.log({"step": step, **metrics}),
        finish=shown.finish,
    )


def _wandb_mode(wandb: Any) -> Literal["offline"] | None:
    """Offline if W&B would ask for a key; else as the user's settings say."""
    if wandb.setup().settings.mode != "online" or wandb.run is not None:
        return None
    return None if wandb.login(prompt=False, verify=False) else "offline"


def _trackio(run: Run, step: int | None) -> Tracker:
    """A Trackio run, which is known by project and name."""
    import trackio  # pyright: ignore[reportMissingImports]

    start = partial(trackio.init, project=run.project, name=run.name, embed=False)
    resume = "allow" if run.metrics() else "never"
    shown: Any = None

    def configure(config: Config) -> None:
        # A config is taken when a run is opened, and at no other time.
        nonlocal resume, shown
        if shown is not None:
            shown.finish()
        # In a new context: in the caller's, it would end the run of another model.
        shown = contextvars.Context().run(start, resume=resume, config=config)
        resume = "allow"

    return Tracker(
        configure,
        log=lambda step, metrics: shown.log(dict(metrics), step=step),
        finish=lambda: shown.finish(),
    )


_CLIENTS: dict[TrackerName, Callable[[Run, int | None], Tracker]] = {
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
}


def check_loggers(names: Sequence[TrackerName]) -> tuple[TrackerName, ...]:
    """The trackers of `logger=[...]`, each once.

    Raises:
        ConfigError: not a list, or an unknown name.
        MissingDependencyError: a client that is not installed.
    """
    if isinstance(names, str):
        raise ConfigError(f"logger = {names!r}: give a list, [{names!r}]")
    for name in names:
        if name not in _CLIENTS:
            choices = ", ".join(map(repr, _CLIENTS))
            hint = suggestion(str(name), _CLIENTS)
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
        self._open: dict[str, Tracker] = {}
        for name in names:
            with self._warning(name, "start"):
                self._open[name] = _CLIENTS[name](run, step)
        self._tell("configure", dict(config))

    def configure(self, section: str, values: Config) -> None:
        """Add a section to the config, unless it is there already."""
        if section not in self._config:
            self._config[section] = values
            self._tell("configure", dict(self._config))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show what a line of metrics.jsonl gains."""
        self._tell("log", step, metrics)

    def finish(self) -> None:
        """Let the clients write what they still hold."""
        self._tell("finish")
        self._open.clear()

    def _tell(self, what: str, *args: Any) -> None:
        for name, tracker in self._open.items():
            with self._warning(name, what):
                getattr(tracker, what)(*args)

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
