"""A worker process: runs the cells that it is sent, one after another.

On its standard input, one resolved spec a line; on its standard output, one JSON object an event:
`step`, `evaluated`, `done` or `error`. The input's end is the parent's end, in whatever way it
came: the worker then stops at once, and the run goes on from its last checkpoint another time.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import sys
import threading
import traceback
from typing import IO, Any

from gspo.core.errors import GspoError
from gspo.core.files import strict_json
from gspo.experiment.heldout import Estimate
from gspo.experiment.loop import run_experiment
from gspo.experiment.spec import Spec


class _Reporter:
    """Tells the parent where the run stands."""

    def __init__(self, out: IO[str]):
        self._out = out

    def send(self, **event: Any) -> None:
        self._out.write(strict_json(event) + "\n")
        self._out.flush()

    def started(self, spec: Spec, step: int, changed: list[str]) -> None:
        self.send(event="step", step=step)

    def stepped(self, step: int, metrics: dict[str, float]) -> None:
        self.send(event="step", step=step)

    def evaluated(self, step: int, estimate: Estimate) -> None:
        self.send(event="evaluated", step=step, reward=estimate.mean)


def main() -> None:
    """Work until the parent closes the input."""
    # What a library prints must not be taken for an event.
    reporter = _Reporter(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    while True:
        line = lines.get()
        try:
            asyncio.run(run_experiment(Spec(**json.loads(line)), reporter))
        except Exception as error:  # one cell's failure is not the others'
            traceback.print_exc()
            name = "" if isinstance(error, GspoError) else f"{type(error).__name__}: "
            reporter.send(event="error", error=f"{name}{error}"[:2000])
        else:
            reporter.send(event="done")


def _listen(lines: queue.Queue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
