"""Everything that a GPU has to tell about gspo, in one process and at most eight minutes.

    python benchmarks/gpu_suite.py                       # on a CUDA device
    python benchmarks/gpu_suite.py --tiny                # every part at toy size on the CPU
    python benchmarks/gpu_suite.py --only head training  # some parts
    python benchmarks/gpu_suite.py --list                # the parts and their budgets

It runs on a machine without a network and without gspo: it uses the source beside it, and the
wheels in `.whl/` of packages that the machine lacks (`make gpu-wheels` fetches them elsewhere).

Each part has a budget in seconds. Its figures are in `OUT/<part>.json` the moment they are known; a
part that fails or runs out of time says so there, and the next one begins. `summary.json` has the
figures of all. The exit code is 0 if each part and each of its rows ended well.

With --tiny, what only a CUDA device has (kernels, launches, waits, allocated bytes) is null, packed
attention is that of the CPU, and the figures mean nothing but that the code runs.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import importlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_parts import bare
from harness import RESULTS, WORK, machine

if TYPE_CHECKING:
    from gpu_parts.bench import Bench, Card

TOTAL_S = 480
TINY_S = 120
"""For each part at toy size, whose own budget is that of a GPU and not of a busy CPU."""
STUCK_S = 15
"""Seconds over the total after which a process that hears no alarm is ended."""
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "numpy", "openai", "pydantic")


@dataclass(frozen=True)
class Part:
    """One module of `gpu_parts` with a function `measure`.

    Attributes:
        name: of the module, and of its file of results.
        seconds: that it may take.
        about: in a few words.
    """

    name: str
    seconds: float
    about: str

    def how(self) -> str:
        """What exactly is measured: the module's docstring."""
        return importlib.import_module(f"gpu_parts.{self.name}").__doc__ or ""

    def measure(self, bench: Bench) -> None:
        """Run it."""
        importlib.import_module(f"gpu_parts.{self.name}").measure(bench)


PARTS = (
    Part("rates", 3, "products in bfloat16, float32 and tf32; copying memory"),
    Part("head", 28, "the vocabulary projection: seconds and error of l_i, by how it rounds"),
    Part("correctness", 110, "packed against plain, engine against trainer, the tests marked gpu"),
    Part("training", 160, "default microbatches; 2k to 64k tokens; full, LoRA, checkpointing, MoE"),
    Part("decoding", 75, "8, 64 and 512 completions; less memory for keys and values"),
    Part("saving", 45, "a checkpoint, and weights published to the engine's copy"),
    Part("demo", 59, "20 steps of embedded:sort on the device and on the CPU"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that were asked for; returns the exit code."""
    started = time.monotonic()
    options = _parser().parse_args(arguments)
    out = options.out or _default_folder(tiny=options.tiny)
    if options.list:
        for part in PARTS:
            print(f"{part.name:12} {part.seconds:4.0f} s  {part.about}")
        print(f"{'together':12} {sum(part.seconds for part in PARTS):4.0f} s of {TOTAL_S}")
        return 0
    if not options.tiny:  # a call that never comes back to Python would hear no alarm
        faulthandler.dump_traceback_later(TOTAL_S + STUCK_S, exit=True)
    wheels = bare.prepare()
    from gpu_parts import runner
    from gpu_parts.bench import card

    chosen = [part for part in PARTS if not options.only or part.name in options.only]
    if options.tiny:
        chosen = [replace(part, seconds=TINY_S) for part in chosen]
    where = card(tiny=options.tiny)
    head = circumstances(where, tiny=options.tiny) | {"wheels": wheels}
    total = TOTAL_S - (time.monotonic() - started)
    results = runner.run_all(chosen, where, out, head, total=total, tiny=options.tiny, say=_say)
    faulthandler.cancel_dump_traceback_later()
    print(runner.table(results))
    seconds = time.monotonic() - started
    print(f"{where.name}: {seconds:.0f} s, imports included; results are in {out}")
    return int(not all(runner.ended_well(result) for result in results))


def circumstances(where: Card, *, tiny: bool) -> dict[str, Any]:
    """What a figure depends on."""
    import torch

    found: dict[str, Any] = {
        "device": where.name,
        "tiny": tiny,
        "limits": {"flops": where.flops, "bytes_per_s": where.bytes_per_s},
        "machine": machine(),
        "versions": {"python": platform.python_version()} | _versions(),
        "commit": _commit(),
        "seed": 0,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }
    if where.device == "cuda":
        own = torch.cuda.get_device_properties(0)
        found["cuda"] = {"version": torch.version.cuda, "bytes": own.total_memory}
    return found


def _versions() -> dict[str, str]:
    out = {}
    for name in PACKAGES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "none"
    return out


def _commit() -> str | None:
    """Of the source; None where that is no clone."""
    try:
        command = ["git", "-C", str(bare.ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _default_folder(*, tiny: bool) -> Path:
    """$OUT; else what is committed, or for toy sizes what is not."""
    if "OUT" in os.environ:
        return Path(os.environ["OUT"])
    return WORK / "gpu-tiny" if tiny else RESULTS / "gpu"


def _say(text: str) -> None:
    print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help="some parts")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--list", action="store_true", help="the parts and their budgets")
    parser.add_argument(
        "--out", type=Path, help="folder of results; default: $OUT, else results/gpu"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
