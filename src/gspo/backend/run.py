"""A run on disk: config.json, metrics.jsonl, trajectories/, checkpoints/."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from openai.types.chat.chat_completion import Choice

from gspo.backend.metrics_file import MetricsFile
from gspo.backend.replay import UpdateRecord, replay_columns, replay_schema
from gspo.backend.traces import trace_columns, trace_schema
from gspo.backend.trackers import Config, Followed, TrackerName, Trackers
from gspo.backend.versions import versions
from gspo.core.errors import RunError
from gspo.core.files import explained, remove, remove_leftovers, replacing, strict_json, write_whole
from gspo.core.timing import timed
from gspo.data.sampled import sampled_logprobs
from gspo.train.checkpoint import checkpoint_name, steps_saved
from gspo.trajectory import Trajectory, TrajectoryGroup

if TYPE_CHECKING:
    from gspo.train.observe import Trace

FORMAT = 1


class Run:
    """The folder `<path>/<project>/<model name>`, held by one process at a time.

    Args:
        path: the backend's folder.
        project, name: of the model.
        identity: what must not change over the run's life, such as the base model.

    Raises:
        RunError: the folder cannot be written, is used by another process, belongs to a newer
            gspo, or to a run with another identity. Nothing was changed then.
    """

    def __init__(self, path: Path, project: str, name: str, identity: Mapping[str, Any]):
        for label, part in (("project", project), ("name", name)):
            half = any("\ud800" <= character <= "\udfff" for character in part)
            if not part or part in (".", "..") or set(part) & set("/\\\0") or half:
                raise RunError(f"model {label} {part!r} cannot be the name of a folder")
        self.project, self.name = project, name
        self._writes = threading.RLock()
        self._closed = False
        self.folder = path / project / name
        self.checkpoints = self.folder / "checkpoints"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder / ".lock")
        except OSError as error:
            raise RunError(
                f"cannot write to the run folder {self.folder}: {error.strerror}. "
                "Choose another with LocalBackend(path=...)"
            ) from None
        try:
            self._identity = dict(identity)
            self._check()
            for folder in (self.folder, self.checkpoints, *self.folder.glob("trajectories/*")):
                remove_leftovers(folder)
            self._lines = MetricsFile(self.folder / "metrics.jsonl")
        except BaseException as error:
            self._lock.close()
            if isinstance(error, OSError):
                raise RunError(f"cannot read the run folder {self.folder}: {error}") from None
            raise
        self.trackers = Trackers()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What is written inside is written to its end before another process can have the run.

        Raises:
            RunError: the run is closed. A step that was being computed then is not saved.
        """
        with self._writes:
            if self._closed:
                raise RunError(f"the run {self.folder} is closed: nothing more is written to it")
            yield

    def claim(self) -> None:
        """Write the identity, once it has proved usable: a misspelt model must not stay."""
        path = self.folder / "config.json"
        if not path.exists():
            stored = {"format": FORMAT, **self._identity, "versions": versions()}
            with self.writing():
                write_whole(path, strict_json(stored, indent=1) + "\n")

    def _check(self) -> None:
        path = self.folder / "config.json"
        if not path.exists():
            return
        try:
            stored = json.loads(path.read_bytes())
            written = stored["format"]
            if type(written) is not int:
                raise TypeError(f"format is {written!r}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunError(f"{path} is damaged ({error}): delete the run or mend it") from None
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror}") from None
        if written > FORMAT:
            raise RunError(
                f"{self.folder} was written by a newer gspo (format {written}, this one reads "
                f"{FORMAT}): upgrade gspo, or use another path"
            )
        for key, value in self._identity.items():
            if stored.get(key) != value:
                raise RunError(
                    f"{self.folder} is a run with {key} {stored.get(key)!r}, not {value!r}: "
                    "give the model another name, or delete that folder"
                )

    def track(self, names: Iterable[TrackerName], step: int | None, config: Config) -> None:
        """Show trackers what is logged from now on; see `Followed` for `step`."""
        followed = Followed(self.folder, self.project, self.name, step, bool(self._lines.read()))
        self.trackers = Trackers(names, followed, config)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step: one line a step, later calls add to its line."""
        with self.writing():
            self._lines.put(step, metrics)
            self.trackers.log(step, metrics)

    def forget_after(self, step: int) -> None:
        """Drop what a killed process logged beyond the step that it saved."""
        with self.writing():
            self._lines.truncate(step)

    def metrics(self) -> list[dict[str, float]]:
        """All lines of metrics.jsonl."""
        return self._lines.read()

    @timed("checkpoint")
    def log_trajectories(
        self,
        groups: Sequence[TrajectoryGroup],
        split: str,
        step: int,
        advantages: Sequence[Sequence[float | None]] | None = None,
        traces: Mapping[int, Sequence[Trace]] | None = None,
        record: UpdateRecord | None = None,
    ) -> Path:
        """Write trajectories/<split>/<step>.parquet, one row a trajectory.

        `traces` are by the trajectory's number in the batch, counted through all groups; `record`
        says how the batch was trained on.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.folder / "trajectories" / split / f"{step:04d}.parquet"
        rows: list[dict[str, Any]] = [
            _row(g, t, trajectory) | {"advantage": advantages[g][t] if advantages else None}
            for g, group in enumerate(groups)
            for t, trajectory in enumerate(group)
        ]
        for number, row in enumerate(rows):
            lengths = [len(turn) for turn in row["token_ids"]]
            row.update(trace_columns((traces or {}).get(number, ()), lengths))
        schema = _schema().with_metadata(record.metadata() if record else None)
        table = pa.Table.from_pylist(rows, schema=schema)
        with self.writing(), explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as building:
                pq.write_table(table, building)
        return path

    def delete_checkpoints(self, keep: set[int]) -> None:
        """Delete all checkpoints but those of these steps."""
        with self.writing(), explained(self.checkpoints):
            for step in steps_saved(self.checkpoints):
                if step not in keep:
                    remove(self.checkpoints / checkpoint_name(step))

    def close(self) -> None:
        """Wait for what is being written, then let another process have the folder.

        From then on nothing is written to the run, whatever is still being computed for it.
        """
        with self._writes:
            self._closed = True
            try:
                self.trackers.finish()
            finally:
                self._lock.close()


def _locked(path: Path) -> IO[str]:
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "?"
        file.close()
        raise RunError(
            f"the run {path.parent} is in use by process {holder}: "
            "close that backend or stop that program first"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def in_use(folder: Path) -> bool:
    """Whether a process holds the run of a folder."""
    try:
        file = (folder / ".lock").open()
    except OSError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _row(group: int, index: int, trajectory: Trajectory) -> dict[str, Any]:
    choices = trajectory.choices()
    messages = [
        {**m.message.model_dump(exclude_none=True), "sampled": True} if isinstance(m, Choice) else m
        for m in trajectory.turns()
    ]
    return {
        "group": group,
        "trajectory": index,
        "reward": float(trajectory.reward),
        "messages": strict_json(messages, default=str),
        "metrics": strict_json(trajectory.metrics),
        "metadata": strict_json(trajectory.metadata),
        "token_ids": [list(getattr(c, "token_ids", None) or []) for c in choices],
        "logprobs": [list(sampled_logprobs(c) or []) for c in choices],
        **replay_columns(choices),
    }


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("group", pa.int32()),
            ("trajectory", pa.int32()),
            ("reward", pa.float64()),
            ("advantage", pa.float64()),
            ("messages", pa.string()),
            ("metrics", pa.string()),
            ("metadata", pa.string()),
            ("token_ids", pa.list_(pa.list_(pa.int32()))),
            ("logprobs", pa.list_(pa.list_(pa.float32()))),
            *trace_schema(),
            *replay_schema(),
        ]
    )
