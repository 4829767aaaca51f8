"""Decoding by this working tree's engine, beside that of another commit.

    python benchmarks/decoding.py c2c3a76
    python benchmarks/decoding.py HEAD~3 --rounds 8 --cases short,one

Each engine runs in a process of its own, on one thread, with the same weights; they take turns case
by case. Seconds are of CPU time, the least of all rounds, so that other processes count little. The
commit before exact mode (c2c3a76) has no exact=True: both of our columns are against its one.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from harness import HERE, child_env

CASES = {
    "short": (32, 16, 16, 13, 13),
    "equal": (8, 32, 8, 48, 48),
    "ragged": (8, 32, 16, 10, 400),
    "shared": (1, 470, 64, 32, 32),
    "long": (8, 66, 16, 200, 200),
    "one": (1, 16, 1, 64, 64),
    "eight": (1, 16, 8, 64, 64),
}
"""P prompts of L tokens, G completions each, of so many to so many tokens."""
ROUND = 2  # a case is sampled so often at a time


def work(folder: str, exact: bool) -> None:
    """Sample the case that each line of standard input names; answer with its CPU seconds."""
    import torch

    from gspo.policy.load import load_policy
    from gspo.policy.probe import choose_packing
    from gspo.serve import selfcheck
    from gspo.serve.engine import Request, SamplingParams
    from gspo.serve.torch_engine import TorchEngine

    torch.set_num_threads(1)
    policy = load_policy(folder)
    choose_packing(policy)
    engine = TorchEngine(policy)
    selfcheck.check_engine(engine)
    make_exact = getattr(selfcheck, "make_exact", None)
    if exact and make_exact is not None:
        make_exact(engine, required=True)
    for line in sys.stdin:
        prompts, length, completions, low, high = CASES[line.strip()]
        rng, requests = random.Random(0), []
        for _ in range(prompts):
            prompt = tuple(rng.randint(6, 65) for _ in range(length))
            for _ in range(1 if low == high else completions):
                params = SamplingParams(
                    n=completions if low == high else 1,
                    max_tokens=rng.randint(low, high),
                    ignore_eos=True,
                )
                requests.append(Request(prompt, params))
        began = time.process_time()
        for _ in range(ROUND):
            engine.generate(requests)
        print(f"seconds {(time.process_time() - began) / ROUND}", flush=True)


@contextmanager
def engine(source: Path, folder: Path, *, exact: bool) -> Iterator[subprocess.Popen[str]]:
    """A process that works for us, with the package in `source`."""
    command = [sys.executable, __file__, "--work", str(folder), *(["--exact"] if exact else [])]
    pipe, env = subprocess.PIPE, child_env(1) | {"PYTHONPATH": str(source)}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, text=True) as process:
        try:
            yield process
        finally:
            process.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]


def seconds(process: subprocess.Popen[str], case: str) -> float:
    """Let it sample a case."""
    assert process.stdin and process.stdout
    process.stdin.write(case + "\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("seconds "):
            return float(line.split()[1])
    raise RuntimeError(f"an engine ended with {process.wait()}")


def compare(commit: str, cases: list[str], rounds: int) -> list[str]:
    """One line for each case."""
    from gspo.policy.embedded import embedded_folder

    lines = [f"{'P x L x G x T':>16}  exact=False: other, ours, ratio; exact=True (CPU ms)"]
    with ExitStack() as stack:
        other = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        archive = ["git", "archive", commit, "src"]
        files = subprocess.run(archive, cwd=HERE.parent, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", other], input=files, check=True)
        folder, ours = embedded_folder("embedded:sort"), HERE.parent / "src"
        engines = [
            stack.enter_context(engine(source, folder, exact=exact))
            for exact in (False, True)
            for source in (other / "src", ours)
        ]
        for case in cases:
            taken = [[seconds(side, case) for side in engines] for _ in range(rounds)]
            least = [min(column) for column in zip(*taken, strict=True)]
            shape = " x ".join(map(str, CASES[case][:4]))
            pairs = zip(least[::2], least[1::2], strict=True)
            each = (f"{1000 * a:8.1f} {1000 * b:8.1f} {b / a:5.2f}" for a, b in pairs)
            lines.append(f"{shape:>16}  " + "   ".join(each))
            print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main() -> None:
    """Compare, or work for a process that does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit", nargs="?", default="c2c3a76", help="the other engine")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--work", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--exact", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.exact)
        return
    cases = options.cases.split(",")
    if unknown := set(cases) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    print("\n".join(compare(options.commit, cases, options.rounds)))


if __name__ == "__main__":
    main()
