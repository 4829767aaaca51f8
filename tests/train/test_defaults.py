"""The learning rate and the warmup of a run that names none."""

from __future__ import annotations

import pytest
import torch

from gspo import dev
from gspo.config import TrainConfig
from gspo.train.defaults import default_learning_rate, with_defaults
from gspo.train.minibatches import prepare
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer
from support import embedded, random_groups


def test_the_table_of_the_page():
    rates = [default_learning_rate(n, False) for n in (1, 229_184, 135e6, 1.7e9, 30e9)]  # pyright: ignore[reportArgumentType]
    assert rates == [1.5e-4, 1.5e-4, 6.2e-6, 1.7e-6, 4.2e-7]
    assert default_learning_rate(135_000_000, True) == 6.2e-5


def test_what_is_left_out_is_filled_in_by_the_model():
    settings = with_defaults(resolve(), embedded())
    assert (settings.learning_rate, settings.lr_warmup_steps) == (1.5e-4, 5)
    lora = with_defaults(resolve(), embedded(lora=dev.LoraConfig()))
    assert lora.learning_rate == 1.5e-3  # of the base model's size, without the adapters


@pytest.mark.parametrize("warmup", [None, 0, 2])
def test_a_rate_of_the_users_stays_as_it_is(warmup: int | None):
    settings = resolve(TrainConfig(learning_rate=0.5), dev.TrainConfig(lr_warmup_steps=warmup))
    assert with_defaults(settings, embedded()) == settings


def test_a_warmup_of_the_users_stays_and_one_of_ours_ends_before_the_schedule():
    policy = embedded()
    asked = with_defaults(resolve(options=dev.TrainConfig(lr_warmup_steps=0)), policy)
    assert asked.lr_warmup_steps == 0
    short = dev.TrainConfig(lr_schedule="linear", lr_total_steps=3)
    assert with_defaults(resolve(options=short), policy).lr_warmup_steps == 2


def test_the_trainer_takes_them():
    policy = embedded()
    batch = prepare(random_groups(policy), context=512)
    trainer = Trainer(policy)
    rates = [trainer.train(batch, resolve()).metrics.compute()["optim/learning_rate"]]
    for _ in range(5):
        out = trainer.train(batch, resolve())
        rates.append(out.metrics.compute()["optim/learning_rate"])
    assert 0 < rates[0] < 3e-5 < rates[2] < 1e-4
    assert rates[-1] == pytest.approx(1.5e-4)
    assert all(torch.isfinite(p).all() for p in policy.trainable.values())
