"""Load a checkpoint, or train a step, save it, and print a digest of all weights and moments.

python -m torch.distributed.run --nproc-per-node 4 tests/train/digests.py /tmp/new [/tmp/old/0001]
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from torch.distributed.tensor import DTensor

import gspo as art
from gspo.backend.loading import load_trainer
from gspo.train.mesh import Mesh
from gspo.train.minibatches import prepare
from gspo.train.settings import resolve

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import random_groups, save_checkpoint


def main(folder: Path, checkpoint: Path | None) -> None:
    mesh = Mesh(60) if int(os.environ["WORLD_SIZE"]) > 1 else None
    config = art.dev.InternalModelConfig(threads=1)
    trainer = load_trainer("embedded:sort", config, checkpoint, mesh)
    if checkpoint is None:
        settings, policy = resolve(), trainer.policy
        batch = prepare(random_groups(policy), settings, context=policy.context)
        trainer.train(batch, settings)
        trainer.policy.workers.finish(trainer.policy.lm)
    save_checkpoint(folder, trainer)
    digest = hashlib.sha256()
    state = {**dict(trainer.policy.lm.named_parameters()), **trainer.optimizer.state()}
    for name in sorted(state):
        tensor = state[name].detach()
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        digest.update(name.encode() + whole.numpy().tobytes())
    if trainer.policy.workers.rank == 0:
        print(f"digest of {len(state)} tensors {digest.hexdigest()}", flush=True)
    if mesh is not None:
        mesh.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2:] else None)
