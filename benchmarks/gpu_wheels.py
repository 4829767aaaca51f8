"""Fill `.whl/` with the wheels that `gpu_suite.py` needs on a machine without a network.

    python benchmarks/gpu_wheels.py          # in the environment that gspo is installed in
    python benchmarks/gpu_wheels.py --list   # only name them
    python benchmarks/gpu_wheels.py liger-kernel cut-cross-entropy   # and peers of the head part

What gspo needs, and what that needs, in the versions of this environment, less what a machine with
PyTorch, transformers and pytest has by itself. The wheels are for Python 3.12 on Linux, x86-64;
nothing is built. Together they must stay below `LIMIT`, which is what such a machine may be sent.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).resolve().parents[1] / ".whl"
LIMIT = 64 * 2**20
ROOTS = ("gspo", "beartype")
"""beartype: the tests marked gpu check shapes with it."""
PYTHON = "3.12"
_PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (39, 35, 34, 31, 28, 27, 24, 17)]
_PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]
_THERE = """
accelerate annotated-doc anyio attrs certifi charset-normalizer click filelock fsspec h11 hf-xet
httpcore httpx huggingface-hub hypothesis idna jaxtyping jinja2 markdown-it-py markupsafe mdurl
networkx numpy packaging peft pluggy prometheus-client psutil pyarrow pygments pytest pyyaml regex
requests rich safetensors setuptools shellingham sympy tokenizers torch tqdm transformers triton
typer typing-extensions urllib3 wadler-lindig
"""
THERE = frozenset(_THERE.split())
"""What the machine has; to carry a torch would take gigabytes."""


def needed(roots: Iterable[str] = ROOTS, there: Iterable[str] = THERE) -> dict[str, str]:
    """Distributions and versions that have to be carried, in the order that they were met."""
    known, found, waiting = frozenset(there), {}, list(roots)
    while waiting:
        name = canonicalize_name(waiting.pop(0))
        if name in found or name in known:
            continue
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            raise SystemExit(f"{name} is not installed here: run `make .venv/.installed`") from None
        waiting += [own.name for own in map(Requirement, requires(name) or []) if _applies(own)]
    found.pop("gspo", None)  # its source is there
    return found


def _applies(requirement: Requirement) -> bool:
    target = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "extra": ""}
    target |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    return requirement.marker is None or requirement.marker.evaluate(target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Download them, one version of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="only name them")
    parser.add_argument("more", nargs="*", help="other distributions, as pip names them")
    options = parser.parse_args(arguments)
    pins = [f"{name}=={own}" for name, own in needed().items()] + options.more
    if options.list:
        print("\n".join(pins))
        return 0
    for wheel in FOLDER.glob("*.whl"):
        wheel.unlink()  # an older version beside a new one: both would be unpacked
    platforms = [option for name in _PLATFORMS for option in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", PYTHON, "--implementation", "cp", *platforms]
    subprocess.run([*command, "-d", str(FOLDER), *pins], check=True)
    total = sum(wheel.stat().st_size for wheel in FOLDER.glob("*.whl"))
    print(f"{FOLDER}: {len(pins)} wheels, {total / 2**20:.1f} MiB")
    return int(total > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
