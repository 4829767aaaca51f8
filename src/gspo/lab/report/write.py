"""What `gspo report` does: which page, and where it goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gspo.core.errors import ConfigError, RunError
from gspo.core.files import read_object, write_whole
from gspo.lab.pictures import require_plotly


def make_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of runs, or of one comparison, and return its path.

    Raises:
        ConfigError: several runs without `out`, or a comparison beside others.
        RunError: a folder that is not one of a run, or a page that cannot be written.
        MissingDependencyError: plotly is not installed.
    """
    require_plotly()  # before it is imported
    from gspo.lab.report.comparison_page import comparison_page
    from gspo.lab.report.run_page import read_runs, run_page

    compared = [folder for folder in folders if (folder / "comparison.json").exists()]
    if len(folders) > 1 and compared:
        raise ConfigError(f"{compared[0]} is a comparison: give only it, or the runs inside it")
    if len(folders) > 1 and out is None:
        raise ConfigError("several runs go into one page: say where, with --out FILE.html")
    path = out or folders[0] / "report.html"
    if not compared:
        write_whole(path, run_page(read_runs(folders)))
        return path
    stored = compared[0] / "comparison.json"
    content = read_object(stored)
    if not content:
        raise RunError(f"{stored} is damaged: run the comparison again")
    write_whole(path, comparison_page(content))
    return path
