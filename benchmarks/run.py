"""Run benchmarks, print one table, store results, and guard against regressions.

    python benchmarks/run.py                      # the CPU set
    python benchmarks/run.py rollout vs_trl:a     # by name, or a part of one
    python benchmarks/run.py --check              # fail where a ratio fell; see guard.py
    python benchmarks/run.py vs_trl --update      # write benchmarks/results/ and the docs page
    python benchmarks/run.py --resume             # leave out what was measured since 12 hours
    python benchmarks/run.py --docs               # only the page's table, from the stored results

A benchmark is any file of this folder with `measure() -> list[dict]`; one with `PARTS` also has
`measure_part(part) -> dict`. Each runs in a process of its own, and what it found is kept in
benchmarks/.work/ at once: a run that is killed goes on with --resume.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import difflib
import importlib
import inspect
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import HERE, WORK, Result, Unavailable, child_env, read, say, warn_if_busy, write

LATEST = WORK / "latest"
SETS = ("cpu", "vllm")
HOURS = 12
TIMEOUT = 3600
UNAVAILABLE = 3
"""Exit code of a benchmark that cannot run here."""


@dataclass(frozen=True)
class Unit:
    """What is run, kept and resumed as a whole: a benchmark, or a part of one."""

    name: str
    part: str | None = None

    def __str__(self) -> str:
        return self.name if self.part is None else f"{self.name}:{self.part}"

    @property
    def latest(self) -> Path:
        """Where its last measurement is kept."""
        return LATEST / f"{str(self).replace(':', '-')}.json"

    @property
    def set(self) -> str:
        """The set that it belongs to."""
        return "vllm" if "vllm" in str(self) else "cpu"


def discover(folder: Path = HERE) -> list[Unit]:
    """The benchmarks of the folder, in order of their names; nothing is imported."""
    units: list[Unit] = []
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if "measure_part" in functions:
            units += [Unit(path.stem, part) for part in _parts(tree)]
        elif "measure" in functions:
            units.append(Unit(path.stem))
    return units


def _parts(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PARTS":
            return [str(part) for part in ast.literal_eval(node.value)]
    raise ValueError("a module with measure_part needs PARTS, a tuple of texts")


def select(names: Sequence[str], wanted: str, units: Sequence[Unit]) -> list[Unit]:
    """The units that were asked for.

    Raises:
        SystemExit: an unknown name.
    """
    if not names:
        return [unit for unit in units if unit.set == wanted]
    chosen = []
    for name in names:
        found = [unit for unit in units if name in (unit.name, str(unit))]
        if not found:
            known = dict.fromkeys([u.name for u in units] + [str(u) for u in units])
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise SystemExit(f"unknown benchmark {name!r}.{hint} Known: {', '.join(known)}.")
        chosen += found
    return list(dict.fromkeys(chosen))


def run_unit(unit: Unit, repeats: int | None = None, *, tiny: bool = False) -> list[Result]:
    """Measure in a process of its own; the rows are kept, unless they are of tiny sizes.

    Raises:
        Unavailable: it cannot run here.
        RuntimeError: it failed, or took longer than `TIMEOUT`.
    """
    LATEST.mkdir(parents=True, exist_ok=True)
    building = unit.latest.with_suffix(".tiny" if tiny else ".part")
    options = [] if repeats is None else ["--repeats", str(repeats)]
    options += ["--tiny"] if tiny else []
    command = [sys.executable, __file__, str(unit), *options, "--child", str(building)]
    log = WORK / f"{unit.latest.stem}.log"
    code, lines = _watched(command, log)
    if code == UNAVAILABLE:
        raise Unavailable(lines[-1] if lines else "no reason given")
    if code:
        raise RuntimeError(f"exit code {code}, {log}\n" + "\n".join(lines[-12:]))
    if tiny:
        return _stored(building)
    os.replace(building, unit.latest)
    return _stored(unit.latest)


def _watched(command: Sequence[str], log: Path) -> tuple[int, list[str]]:
    """Exit code and last lines of a process; its progress is passed on, the rest goes to `log`."""
    lines: list[str] = []
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=child_env(1)
        )
        stop = threading.Timer(TIMEOUT, process.kill)
        stop.start()
        try:
            for line in process.stdout or ():
                out.write(line)
                if line.startswith(harness.SAYS):
                    say(line.removeprefix(harness.SAYS).rstrip())
                else:
                    lines = [*lines[-50:], line.rstrip()]
            return process.wait(), lines
        finally:
            stop.cancel()
            process.kill()
            if process.stdout is not None:
                process.stdout.close()


def child(unit: Unit, options: dict[str, Any], out: Path) -> int:
    """Inside that process: measure and write the rows."""
    os.environ[harness.CHILD] = "1"
    module = importlib.import_module(unit.name)
    measure = module.measure if unit.part is None else partial(module.measure_part, unit.part)
    known = inspect.signature(measure).parameters
    for name in options:
        if name not in known:
            print(f"{unit} has no --{name}")
            return UNAVAILABLE
    try:
        rows = measure(**options)
    except Unavailable as error:
        print(error)
        return UNAVAILABLE
    rows = rows if unit.part is None else [rows]
    out.write_text(json.dumps([Result.of(row).as_dict() for row in rows], indent=1))
    return 0


def _stored(path: Path) -> list[Result]:
    return [Result.of(row) for row in json.loads(path.read_text())]


def fresh(unit: Unit) -> list[Result] | None:
    """The rows of a measurement that is younger than `HOURS`, else None."""
    if not unit.latest.exists():
        return None
    written = datetime.datetime.fromtimestamp(unit.latest.stat().st_mtime)
    old = datetime.datetime.now() - written > datetime.timedelta(hours=HOURS)
    return None if old else _stored(unit.latest)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 after a failure or a regression."""
    options = _parser().parse_args(arguments)
    units = select(options.names, options.set, discover())
    if options.child:
        given = {"repeats": options.repeats, "tiny": options.tiny}
        return child(units[0], {k: v for k, v in given.items() if v}, Path(options.child))
    if options.tiny and (options.update or options.check or options.resume):
        raise SystemExit("--tiny measures nothing: leave out --update, --check and --resume")
    import table

    if options.docs:
        changed = table.update_page()
        print(f"{table.PAGE}: {'updated' if changed else 'as it was'}")
        return 0
    if options.list:
        print("\n".join(f"{unit.set:5} {unit}" for unit in units))
        return 0
    committed = [row for name in {u.name for u in units} for row in read(name)]
    warn_if_busy()
    rows, skipped, failed = _run_all(units, options)
    if rows:
        table.show(rows, tiny=options.tiny)
    for text in (*skipped, *failed):
        print(text)
    if options.update:
        table.update_page()
    return int(bool(failed) | (options.check and _checked(committed, rows)))


def _run_all(
    units: Sequence[Unit], options: argparse.Namespace
) -> tuple[list[Result], list[str], list[str]]:
    """Rows, and a line for each benchmark that was skipped or failed."""
    rows: list[Result] = []
    skipped, failed = [], []
    for unit in units:
        own = fresh(unit) if options.resume else None
        say(f"{unit}: measured before" if own else f"{unit} ...")
        try:
            own = own or run_unit(unit, options.repeats, tiny=options.tiny)
        except Unavailable as error:
            skipped.append(f"skipped {unit}: {error}")
            continue
        except RuntimeError as error:
            failed.append(f"FAILED {unit}: {error}")
            continue
        rows += own
        if options.update:
            write(own)
    return rows, skipped, failed


def _checked(committed: Sequence[Result], rows: Sequence[Result]) -> bool:
    """Print what the guard found; True where something got worse."""
    import guard

    found = guard.regressions(committed, rows)
    for line in found:
        print(f"REGRESSION {line}")
    known = {row.key for row in committed}
    compared = sum(row.key in known for row in rows)
    print(f"guard: {compared} of {len(rows)} rows have a committed ratio, {len(found)} regressed")
    return bool(found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="benchmarks, or parts such as vs_trl:a")
    parser.add_argument("--set", choices=SETS, default="cpu", help="without names: which ones")
    parser.add_argument("--repeats", type=int, help="pairs to measure, instead of the usual number")
    parser.add_argument("--check", action="store_true", help="compare with the committed ratios")
    parser.add_argument("--update", action="store_true", help="store results, update the page")
    parser.add_argument("--resume", action="store_true", help=f"not again within {HOURS} hours")
    parser.add_argument("--docs", action="store_true", help="only update the page's table")
    parser.add_argument("--list", action="store_true", help="only name them")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: do the scripts run?")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
