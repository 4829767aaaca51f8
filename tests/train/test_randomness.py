"""Training is in evaluation mode: on unchanged weights every ratio is 1, whatever a model has that
is random in train mode."""

from __future__ import annotations

from pathlib import Path

import pytest

import gspo as art
from gspo import dev
from gspo.policy.load import load_policy
from gspo.policy.probe import choose_packing
from gspo.serve.engine import Request, SamplingParams
from gspo.serve.selfcheck import check_engine
from gspo.serve.torch_engine import TorchEngine
from gspo.train.minibatches import prepare
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer
from models import folder, text
from support import choice, trajectory


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["opt", "jitter", "qwen3_next", "granite"])
def test_the_first_step_has_ratio_one(kind: str, recompute: bool, tmp_path: Path):
    config = dev.InternalModelConfig(activation_checkpointing=recompute)
    policy = load_policy(folder(tmp_path, kind), config)
    choose_packing(policy)
    engine = TorchEngine(policy)
    check_engine(engine)
    prompt = tuple(text(7).tolist())
    params = SamplingParams(n=4, max_tokens=12, seed=1, ignore_eos=True)
    (done,) = engine.generate([Request(prompt, params)])
    group = art.TrajectoryGroup(
        [trajectory(float(i), choice(c.token_ids, prompt, c.logprobs)) for i, c in enumerate(done)]
    )
    options = dev.TrainConfig(minibatches=1, packed_sequence_length=30)
    before = [p.detach().clone() for p in policy.trainable.values()]
    metrics = Trainer(policy).train(prepare([group], context=256), resolve(options=options))
    values = metrics.metrics.compute()
    assert values["ratio/log_abs_max"] < 1e-4
    assert values["ratio/clip_fraction"] == 0
    moved = zip(before, policy.trainable.values(), strict=True)
    assert any(bool((old != new).any()) for old, new in moved)
