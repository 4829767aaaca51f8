"""Compare the golden runs with the committed curves, or write them anew.

    python tests/golden/golden.py                  # or: make golden
    python tests/golden/golden.py gspo kl          # these alone
    python tests/golden/golden.py --write          # after a change that is meant to move numbers

On a CPU of the kind that wrote the curves, with the same torch, every number must be the same to
the bit. Elsewhere products are summed in another order: there metrics and the weights' sums must
agree within 1e-6 (`Case.tolerance`), of their size where that is above 1, and shares within 0.05:
one sequence or expert that rounding moves over a limit is counted whole. Rounding may also draw
another token, after which nothing of a run can be compared: such a run is named and is no failure,
unless more than a fifth of the runs are so. Whoever writes the curves anew says in CHANGELOG.md
which numbers moved and why.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from runs import CASES, make_base, run

CURVES = Path(__file__).parent / "curves.json"
SHARES = ("fraction", "changed")
"""Parts of the names of metrics that count how many are over a limit."""
SHARE_TOLERANCE = 0.05
OTHER_TOKENS = "other tokens were sampled here: not comparable"
MOST_OTHERS = 0.2
"""More runs than this share with other tokens are no rounding: sampling itself has moved."""
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve")


def machine() -> dict[str, Any]:
    """What decides in which order a CPU adds: its maker and vector units, and torch."""
    known: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            known.setdefault(key.strip(), value.strip())
    flags = (known.get("flags") or known.get("Features") or "").split()
    return {
        "architecture": platform.machine(),
        "vendor": known.get("vendor_id") or known.get("CPU implementer") or platform.processor(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__.partition("+")[0],
    }


def differences(
    committed: Mapping[str, Any], found: Mapping[str, Any], tolerance: float
) -> Iterator[str]:
    """What a run does not share with its committed curve, a line each. Tolerance 0: to the bit.

    >>> same = {"steps": [{"loss/policy": 0.5}], "weights_sum": 2.0}
    >>> list(differences(same, same, 0))
    []
    >>> moved = {"steps": [{"loss/policy": 0.5001}], "weights_sum": 2.0}
    >>> list(differences(same, moved, 1e-6))
    ['step 1: loss/policy is 0.5001, committed 0.5']
    """
    pairs = [
        (f"step {i + 1}: ", *two)
        for i, two in enumerate(zip(committed["steps"], found["steps"], strict=False))
    ]
    if len(committed["steps"]) != len(found["steps"]):
        yield f"{len(found['steps'])} steps, committed {len(committed['steps'])}"
    rest = [{k: v for k, v in side.items() if k != "steps"} for side in (committed, found)]
    for where, old, new in [*pairs, ("", *rest)]:
        for key in sorted({*old, *new}):
            if key not in old or key not in new:
                yield f"{where}{key} is {'new' if key in new else 'gone'}"
            elif not _agree(key, old[key], new[key], tolerance):
                yield f"{where}{key} is {new[key]}, committed {old[key]}"


def _agree(key: str, old: Any, new: Any, tolerance: float) -> bool:
    if key == "weights" and tolerance:
        return True  # a digest has no tolerance; the sums stand for it
    if isinstance(old, str) or not tolerance:
        return old == new
    if any(word in key for word in SHARES):
        return abs(old - new) <= SHARE_TOLERANCE
    return abs(old - new) <= tolerance * max(1.0, abs(old))


def compare(
    committed: Mapping[str, Any], found: Mapping[str, Any], *, exact: bool
) -> tuple[list[str], list[str]]:
    """Compare runs with their committed curves, both by name.

    Args:
        committed, found: run -> its curve; one that is not committed has no steps.
        exact: the machine is of the kind that wrote the curves.

    Returns:
        What to print, and those of these lines that are a failure.
    """
    lines: list[str] = []
    others: list[str] = []
    for name, curve in found.items():
        old = committed.get(name, {"steps": []})
        if not exact and "sampled" in old and old["sampled"] != curve["sampled"]:
            others.append(f"{name}: {OTHER_TOKENS}")
            continue
        tolerance = 0.0 if exact else CASES[name].tolerance
        lines += [f"{name}: {line}" for line in differences(old, curve, tolerance)]
    too_many = len(others) > MOST_OTHERS * len(found)
    return lines + others, lines + (others if too_many else [])


async def _all(names: Sequence[str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    logging.getLogger("gspo").setLevel(logging.ERROR)  # advice on the clip range, 27 times
    out = {}
    with tempfile.TemporaryDirectory() as scratch:
        bases = {k: make_base(k, Path(scratch) / k) for k in {CASES[n].base for n in names}}
        for name in names:
            out[name] = await run(name, bases[CASES[name].base], Path(scratch) / "runs")
    return out


def main(arguments: Sequence[str]) -> int:
    """Write or compare; 1 where something moved."""
    names = [name for name in arguments if not name.startswith("-")] or list(CASES)
    unknown = [a for a in arguments if a not in CASES and a != "--write"]
    if unknown:
        print(f"unknown run or option {unknown[0]!r}: give --write, or some of {', '.join(CASES)}")
        return 2
    here = machine()
    found = asyncio.run(_all(names))
    stored = json.loads(CURVES.read_text()) if CURVES.exists() else {"machine": here, "runs": {}}
    if "--write" in arguments:
        if stored["machine"] != here and len(names) < len(CASES):
            print("the other curves are of another machine: write them all")
            return 2
        runs = {
            name: (stored["runs"] | found)[name] for name in CASES if name in stored["runs"] | found
        }
        CURVES.write_text(json.dumps({"machine": here, "runs": runs}, indent=1) + "\n")
        print(f"{len(found)} runs written to {CURVES}")
        return 0
    exact = stored["machine"] == here
    lines, failures = compare(stored["runs"], found, exact=exact)
    for line in lines:
        print(line)
    how = "to the bit" if exact else f"with a tolerance, since this is another machine: {here}"
    print(f"{len(names)} golden runs, compared {how}: {len(failures)} differences")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
