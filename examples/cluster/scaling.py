"""Seconds of a step from 1 to 1,024 GPUs, by the counts and rates of `gspo plan`.

    python examples/cluster/scaling.py Qwen/Qwen3-30B-A3B
    python examples/cluster/scaling.py Qwen/Qwen3-8B --completions 4096 --gpu h200

A simulation, not a measurement: what it assumes is what `gspo plan` prints. `speedup` is against
one GPU, or, where one has no room, against a share of the fewest that have. `fails first` says what
stops a row from being better: memory (nothing fits), the longest completion (rollouts that more
servers make no shorter), or the trainer.
"""

from __future__ import annotations

import argparse

from gspo.core.errors import ConfigError, GspoError
from gspo.sizing.cluster import GPUS, Rates, Rollouts, fits, layouts
from gspo.sizing.model_size import read_size


def main() -> None:
    """Print a row for each power of two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--gpu", default="h100", choices=GPUS)
    parser.add_argument("--completions", type=int, default=512)
    parser.add_argument("--mean", type=int, default=2048)
    parser.add_argument("--longest", type=int, default=8192)
    options = parser.parse_args()
    try:
        size, gpu = read_size(options.model), GPUS[options.gpu]
        wanted = Rollouts(options.completions, 512, options.mean, options.longest)
    except GspoError as error:
        parser.error(str(error))
    print(f"{'GPUs':>5} {'train':>6} {'roll out':>8} {'seconds':>8} {'speedup':>8}  fails first")
    first = None
    for gpus in (2**power for power in range(11)):
        how = next((fit.how for fit in fits(size, wanted, gpu, gpus, 16) if fit.fits), None)
        try:
            best = layouts(size, how, wanted, gpu, gpus, Rates())[0] if how else None
        except ConfigError:
            best = None
        if best is None or how is None:
            print(f"{gpus:>5} {'-':>6} {'-':>8} {'-':>8} {'-':>8}  memory")
            continue
        first = first or best.seconds * gpus
        trained = best.parts["scoring"] + best.parts["training"]
        fails = "the longest completion" if best.parts["rollouts"] > trained else "the trainer"
        rolling = best.rollout_gpus if best.overlapped else "same"
        print(
            f"{gpus:>5} {best.training_gpus:>6} {rolling:>8} {best.seconds:>8.1f} "
            f"{first / best.seconds:>8.1f}  {fails}; {how.about()}"
        )


if __name__ == "__main__":
    main()
