"""The loss of given answers is the token mean of a batch, however it is packed."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import gspo as art
from gspo import dev
from gspo.core.errors import ConfigError, NumericsError
from gspo.data.sample import Sample, sample_of
from gspo.data.turn import Turn
from gspo.policy.embedded import embedded_folder
from gspo.policy.workers import Workers
from gspo.train.settings import resolve
from gspo.train.supervised import plan_sft, sft_gradient, train_sft
from gspo.train.trainer import Trainer
from support import embedded


def samples(count: int = 5) -> list[Sample]:
    """Of one or two answers, of unequal lengths, half of them behind the same prompt."""
    made = []
    for i in range(count):
        prompt = [3, 10, 11, 12, *([] if i % 2 else [13 + i] * i), 4]
        answer = [*[20 + i, 21, 22][: 1 + i % 3], 5]
        turns = [Turn(prompt, answer, [0.0] * len(answer))]
        if i % 2:
            asked = [*prompt, *answer, 3, 30, 4]
            turns.append(Turn(asked, [31, 5], [0.0, 0.0]))
        made.append(sample_of(turns, trajectory_id=i, group_id=i))
    return made


def naive(batch: list[Sample]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient in float64, one sample after the other, with full logits."""
    folder: Any = embedded_folder("embedded:sort")
    lm = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    total, loss = 0, torch.zeros((), dtype=torch.float64)
    for sample in batch:
        ids = torch.from_numpy(sample.tokens)
        logprobs = lm(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        for t in range(1, len(ids)):
            if sample.ratio_mask[t]:
                loss = loss - logprobs[t - 1, ids[t]]
                total += 1
    (loss / total).backward()
    gradients = {n: p.grad for n, p in lm.named_parameters() if p.grad is not None}
    return float(loss.detach()) / total, gradients


@pytest.mark.parametrize("tokens", [12, 40, None], ids=["alone", "some", "packed"])
@pytest.mark.parametrize("workers", [1, 2])
def test_loss_and_gradient_are_those_of_a_naive_loop(tokens: int | None, workers: int):
    policy, batch = embedded(), samples()
    policy.workers = Workers(workers)
    settings = resolve(options=dev.TrainConfig(packed_sequence_length=tokens))
    loss, total = sft_gradient(policy, batch, settings)
    expected, gradients = naive(batch)
    assert total == sum(sample.sampled for sample in batch)
    assert loss == pytest.approx(expected, rel=1e-5)
    own = {n: p.grad for n, p in policy.trainable.items() if p.grad is not None}
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name].double(), gradient, rtol=1e-3, atol=2e-5)


def test_each_epoch_has_each_sample_once_in_an_order_of_its_own():
    policy = embedded()
    config = art.TrainSFTConfig(batch_size=4, epochs=3, seed=7)
    plan = plan_sft(10, config, policy)
    assert [len(batch) for batch, _ in plan] == [4, 4, 2] * 3
    epochs = [list(chain(*(batch for batch, _ in plan[i : i + 3]))) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert plan == plan_sft(10, config, policy)
    other = plan_sft(10, art.TrainSFTConfig(batch_size=4, epochs=3, seed=8), policy)
    assert plan != other
    given = plan_sft(10, art.TrainSFTConfig(batch_size=4), policy)
    assert [batch for batch, _ in given] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [rate for _, rate in given] == [1.5e-4] * 3  # by the model's size


def test_learning_rates():
    policy = embedded()
    each = art.TrainSFTConfig(batch_size=1, learning_rate=[0.1, 0.2])
    assert [rate for _, rate in plan_sft(2, each, policy)] == [0.1, 0.2]
    with pytest.raises(ConfigError, match="2 numbers, but 3 trajectories make 3 batches"):
        plan_sft(3, each, policy)
    linear = art.TrainSFTConfig(batch_size=1, learning_rate=1.0, lr_schedule="linear")
    rates = [rate for _, rate in plan_sft(20, linear, policy)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[-1] > 0
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert plan_sft(1, linear, policy) == [([0], 1.0)]


def test_a_call_is_one_step_and_one_version():
    trainer = Trainer(embedded())
    metrics = train_sft(trainer, samples(), [([0, 1], 1e-3), ([2, 3, 4], 2e-3)]).compute()
    assert (trainer.step, trainer.policy.version) == (1, 1)
    assert (metrics["sft/batches"], metrics["sft/learning_rate"]) == (2, 2e-3)
    assert metrics["sft/tokens"] == sum(sample.sampled for sample in samples())
    first, last = metrics["sft/loss_first"], metrics["sft/loss_last"]
    assert min(first, last) < metrics["sft/loss"] < max(first, last)


def test_a_gradient_that_is_not_finite_makes_no_update(monkeypatch: pytest.MonkeyPatch):
    trainer = Trainer(embedded())
    step = trainer.optimizer.step
    rates: list[float] = []

    def second_fails(rate: float, options: Any) -> float:
        rates.append(rate)
        if len(rates) == 2:
            next(iter(trainer.policy.trainable.values())).grad.fill_(torch.nan)  # pyright: ignore[reportOptionalMemberAccess]
        return step(rate, options)

    monkeypatch.setattr(trainer.optimizer, "step", second_fails)
    with pytest.raises(NumericsError, match=r"SFT in step 0, batch 1: .* its update was not made"):
        train_sft(trainer, samples(), [([0], 1e-3), ([1], 1e-3)])
    assert (trainer.step, trainer.policy.version) == (0, 1)  # the first batch has moved weights
    assert all(p.grad is None for p in trainer.policy.trainable.values())
    assert all(torch.isfinite(p).all() for p in trainer.policy.trainable.values())
