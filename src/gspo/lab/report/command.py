"""What `gspo report` does: which page, where it goes, and whether it is kept up to date."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from gspo.core.errors import ConfigError, RunError
from gspo.lab.report.comparison import comparison_page
from gspo.lab.report.live import watch_report, write_report
from gspo.lab.report.page import require_plotly, write_page


def make_report(
    folders: Sequence[Path], out: Path | None, watch: bool
) -> tuple[Path, Callable[[], None]]:
    """Write the page of runs, or of one comparison. Returns its path, and what keeps it up to date.

    Raises:
        ConfigError: several runs and no `out`, or a comparison that is to be watched or mixed.
        RunError: a folder that is not one of a run, or a page that cannot be written.
        MissingDependencyError: plotly is not installed.
    """
    require_plotly()
    compared = [folder for folder in folders if (folder / "comparison.json").exists()]
    if len(folders) > 1 and compared:
        raise ConfigError(f"{compared[0]} is a comparison: give it alone, or the runs inside it")
    if out is None:
        if len(folders) > 1:
            raise ConfigError("several runs go into one page: say where, with --out FILE.html")
        out = folders[0] / "report.html"
    if compared:
        if watch:
            raise ConfigError("--watch follows runs, not a comparison: leave it out")
        write_page(out, comparison_page(read_comparison(compared[0]), compared[0]))
        return out, lambda: None
    write_report(folders, out, live=watch)
    return out, partial(watch_report, folders, out) if watch else lambda: None


def read_comparison(folder: Path) -> dict:
    """comparison.json of a folder.

    Raises:
        RunError: it is damaged.
    """
    path = folder / "comparison.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error}): run the comparison again") from None
