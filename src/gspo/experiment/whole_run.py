"""Whole runs: `art.train` on rows and rewards of the user's own, `gspo sft`, `gspo demo`."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gspo as art
from gspo.core.errors import DataError
from gspo.dev import TrainConfig
from gspo.experiment.loop import Outcome, run_experiment
from gspo.experiment.saved_run import SavedRun
from gspo.experiment.spec import Spec
from gspo.experiment.stop import run_until_signal
from gspo.experiment.watch import LiveWatch
from gspo.tasks.dataset import load_dataset
from gspo.train.defaults import WARMUP
from gspo.utils.sft import read_trajectories

Function = str | Callable[..., Any]
DEMO_STEPS = 120


def train(
    *, model: str, dataset: Any, reward: Function | Sequence[Function], **options: Any
) -> Outcome:
    """Train `model` on a dataset until the run's last step, and measure what it has learned.

    The same call goes on with a run that was stopped. It may be made in a notebook.

        art.train(model="embedded:sort", dataset="data.jsonl", reward=exact, steps=20)

    Args:
        model: `embedded:<task>`, a folder, or a hub id.
        dataset: a file of JSONL, CSV or parquet; a folder or a name that the `datasets` library
            loads; a list of dicts; or a `datasets.Dataset`.
        reward: a function or several, or their names as `module:function`. Each is
            `(completion, row) -> float`, or TRL's `(completions, **columns) -> list[float]`.
        options: the fields of a run's file, such as `steps`, `name`, `data={...}`.

    Raises:
        GspoError: an option, a row or a reward is refused.
    """
    rewards = [reward] if isinstance(reward, str) or callable(reward) else [*reward]
    named = [f if isinstance(f, str) else getattr(f, "__qualname__", repr(f)) for f in rewards]
    in_file = isinstance(dataset, str | Path)
    source = str(dataset) if in_file else "rows in memory"
    spec = Spec(model=model, dataset=source, reward=named, **options)
    source = source if in_file else dataset
    task = load_dataset(source, rewards, spec.reward_weights, spec.data)
    with LiveWatch() as watch:
        return _finished(run_experiment(spec.with_steps(task), watch, task))


def _finished(run: Coroutine[Any, Any, Outcome]) -> Outcome:
    """The outcome, whether or not an event loop runs in this thread already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        main = threading.current_thread() is threading.main_thread()
        return run_until_signal(run) if main else asyncio.run(run)
    # A notebook: it waits, as for any other cell.
    loop = asyncio.new_event_loop()
    task = loop.create_task(run)
    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(loop.run_until_complete, task).result()
        except KeyboardInterrupt:
            loop.call_soon_threadsafe(task.cancel)
            raise
        finally:
            pool.submit(loop.close)


async def tune(
    data: Path, model: art.TrainableModel, config: art.TrainSFTConfig, path: str
) -> art.TrainResult:
    """`gspo sft`: train a model on conversations, or go on with the run of its name."""
    lessons = read_trajectories(data)  # before a model is loaded or a run is begun
    folder = Path(path).expanduser() / model.project / model.name
    begun = folder.exists()
    try:
        async with art.LocalBackend(path) as backend:
            await model.register(backend)
            return await model.train_sft(lessons, config)
    except DataError:
        if not begun:  # nothing was trained: no empty run stays behind
            shutil.rmtree(folder)
        raise


def demo_spec(path: str, steps: int = DEMO_STEPS, seed: int = 0) -> Spec:
    """`gspo demo`: a Mixture-of-Experts model learns to sort, in about a minute.

    GSPO as in the paper; only the schedule is tuned.
    """
    spec = Spec(
        project="demo",
        path=path,
        task="sort",
        steps=steps,
        seed=seed,
        learning_rate=3e-4,
        train=TrainConfig(importance_sampling_level="sequence", lr_warmup_steps=WARMUP),
    )
    named = (spec.model_copy(update={"name": f"sort-{number}"}) for number in itertools.count(1))
    return next(spec for spec in named if not spec.folder.exists() or _unfinished(spec))


def _unfinished(spec: Spec) -> bool:
    """Whether the folder holds the same demo, stopped half-way, which is then continued."""
    run = SavedRun.of(spec.folder)
    return run.spec == spec and run.steps < spec.steps
