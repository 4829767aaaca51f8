"""A run on disk: config.json, metrics.jsonl, trajectories/, checkpoints/."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from openai.types.chat.chat_completion import Choice

from gspo.backend.replay import UpdateRecord, replay_columns, replay_schema
from gspo.backend.traces import trace_columns, trace_schema
from gspo.backend.trackers import Config, Followed, TrackerName, Trackers
from gspo.backend.versions import versions
from gspo.batch.choice import sampled_logprobs
from gspo.errors import RunError
from gspo.timing import timed
from gspo.trajectory import Trajectory, TrajectoryGroup

if TYPE_CHECKING:
    from gspo.train.trace import Trace

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
            if not part or part in (".", "..") or set(part) & set("/\\\0"):
                raise RunError(f"model {label} {part!r} cannot be the name of a folder")
        self.project, self.name = project, name
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
        except BaseException:
            self._lock.close()
            raise
        self._lines = _Lines(self.folder / "metrics.jsonl")
        self.trackers = Trackers()

    def claim(self) -> None:
        """Write the identity, once it has proved usable: a misspelt model must not stay."""
        path = self.folder / "config.json"
        if not path.exists():
            stored = {"format": FORMAT, **self._identity, "versions": versions()}
            _write_whole(path, json.dumps(stored, indent=1) + "\n")

    def _check(self) -> None:
        path = self.folder / "config.json"
        if not path.exists():
            return
        try:
            stored = json.loads(path.read_text())
            written = stored["format"]
        except (ValueError, KeyError) as error:
            raise RunError(f"{path} is damaged ({error}): delete the run or mend it") from None
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
        self._lines.put(step, metrics)
        self.trackers.log(step, metrics)

    def forget_after(self, step: int) -> None:
        """Drop what a killed process logged beyond the step that it saved."""
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

        folder = self.folder / "trajectories" / split
        folder.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = [
            _row(g, t, trajectory) | {"advantage": advantages[g][t] if advantages else None}
            for g, group in enumerate(groups)
            for t, trajectory in enumerate(group)
        ]
        for number, row in enumerate(rows):
            lengths = [len(turn) for turn in row["token_ids"]]
            row.update(trace_columns((traces or {}).get(number, ()), lengths))
        path = folder / f"{step:04d}.parquet"
        building = path.with_suffix(f".{os.getpid()}.tmp")
        schema = _schema().with_metadata(record.metadata() if record else None)
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), building)
        os.replace(building, path)
        return path

    def delete_checkpoints(self, keep: set[int]) -> None:
        """Delete all checkpoints but those of these steps."""
        for path in self.checkpoints.glob("[0-9]*"):
            if path.name.isdigit() and int(path.name) not in keep:
                # Renamed first, so that a kill leaves no half checkpoint under its name.
                doomed = path.with_name(f".{path.name}.deleted")
                path.rename(doomed)
                shutil.rmtree(doomed)

    def close(self) -> None:
        """End the trackers and let another process have the folder."""
        try:
            self.trackers.finish()
        finally:
            self._lock.close()


class _Lines:
    """metrics.jsonl: lines in order of their steps, the last of which may still grow."""

    def __init__(self, path: Path):
        self._path = path
        self._last = 0  # where the last line begins
        self._records = self._load()

    def _load(self) -> list[dict[str, float]]:
        records = []
        text = self._path.read_text() if self._path.exists() else ""
        for line in text.splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:  # the line that a killed process was writing
                break
        if text:
            self._rewrite(records)
        return records

    def put(self, step: int, metrics: Mapping[str, float]) -> None:
        last = self._records[-1] if self._records else None
        if last is not None and last["step"] == step:
            self._replace_last(last | dict(metrics))
        elif last is None or last["step"] < step:
            self._append({"step": step, **metrics})
        else:
            known = {record["step"]: record for record in self._records}
            known[step] = {"step": step, **known.get(step, {}), **metrics}
            self._records = [known[key] for key in sorted(known)]
            self._rewrite(self._records)

    def _append(self, record: dict[str, float]) -> None:
        self._records.append(record)
        with self._path.open("a") as file:
            self._last = file.tell()
            file.write(_line(record))

    def _replace_last(self, record: dict[str, float]) -> None:
        """In place: a long run's file is not written anew at each step."""
        self._records[-1] = record
        with self._path.open("r+") as file:
            file.seek(self._last)
            file.write(_line(record))
            file.truncate()

    def truncate(self, step: int) -> None:
        kept = [record for record in self._records if record["step"] <= step]
        if len(kept) != len(self._records):
            self._rewrite(kept)
            self._records = kept

    def read(self) -> list[dict[str, float]]:
        return [dict(record) for record in self._records]

    def _rewrite(self, records: list[dict[str, float]]) -> None:
        lines = [_line(record) for record in records]
        self._last = sum(len(line.encode()) for line in lines[:-1])
        _write_whole(self._path, "".join(lines))


def _line(record: Mapping[str, float]) -> str:
    return json.dumps(record) + "\n"


def _write_whole(path: Path, text: str) -> None:
    building = path.with_name(f".{path.name}.{os.getpid()}")
    building.write_text(text)
    os.replace(building, path)


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
        "messages": json.dumps(messages, default=str),
        "metrics": json.dumps(trajectory.metrics),
        "metadata": json.dumps(trajectory.metadata),
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
