"""Rows computed side by side add up to what they add up to one after the other."""

from __future__ import annotations

import random

import pytest
import torch

import gspo as art
from gspo import dev
from gspo.core.errors import NumericsError
from gspo.data.packing import pack
from gspo.policy.load import Policy
from gspo.policy.workers import Workers
from gspo.train.minibatches import prepare
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer
from support import choice, embedded, random_groups, trajectory


def trained(workers: int, options: dev.TrainConfig, **load) -> tuple[dict, dict[str, torch.Tensor]]:
    policy = embedded(**load)
    policy.workers = Workers(workers)
    batch = prepare(random_groups(policy), context=512)
    out = Trainer(policy, lambda _: embedded()).train(batch, resolve(options=options))
    metrics = out.metrics.compute()
    metrics.pop("time/train")
    return metrics, {name: p.detach().clone() for name, p in policy.trainable.items()}


CASES = {
    "plain": ({}, {}),
    "recomputed layers": ({}, {"activation_checkpointing": True}),
    "replay and balance": (
        {"routing_replay": "old_policy", "router_aux_loss_coef": 0.01, "measure_routing": True},
        {"activation_checkpointing": True},
    ),
    "old log-probs of the trainer": ({"old_logprobs": "trainer"}, {}),
    "reference": ({"kl_penalty_coef": 0.1}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_workers_do_what_one_does(case: str):
    """AdamW's first step is a sign: rounding could flip it where a gradient is nearly 0, so
    SGD-like settings, with an epsilon that dwarfs the gradients, are compared."""
    options, load = CASES[case]
    settings = dev.TrainConfig(
        **options, minibatches=2, packed_sequence_length=90, adam_epsilon=1e3
    )
    (alone, one), (together, two) = trained(1, settings, **load), trained(2, settings, **load)
    assert together.keys() == alone.keys()
    packing = {"tokens/packed_efficiency", "tokens/computed", "tokens/shared_saving"}
    for name in alone.keys() - packing:
        assert together[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5), name
    for name, parameter in one.items():
        torch.testing.assert_close(two[name], parameter, rtol=1e-5, atol=1e-9)


def test_two_workers_end_in_the_same_bits_every_time():
    settings = dev.TrainConfig(minibatches=2, packed_sequence_length=90)
    first, second = trained(2, settings)[1], trained(2, settings)[1]
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name]), name


def test_adapters_are_trained_by_one_worker():
    """peft swaps weights on the module while it computes."""
    assert embedded(lora=dev.LoraConfig(r=2), threads=2).workers.count == 1
    assert embedded(threads=2).workers.count == 2
    assert embedded(threads=1).workers.count == 1


def test_microbatches_are_even_among_the_workers():
    policy: Policy = embedded()
    samples = [s for own in prepare(random_groups(policy), context=512).samples for s in own] * 16
    samples = [
        type(s)(**{**s.__dict__, "trajectory_id": i, "group_id": i // 4})
        for i, s in enumerate(samples)
    ]
    policy.workers = Workers(2)
    workers = policy.workers.count
    sizes = [one.token_count for one in pack(samples, 10_000, workers=workers)]
    assert len(sizes) == 2
    assert max(sizes) < 1.2 * min(sizes)
    policy.workers = Workers(1)
    assert len(pack(samples, 10_000, workers=policy.workers.count)) == 1


def test_microbatches_are_not_cut_if_both_would_hold_the_same_prompt():
    """Sixteen answers of 64 tokens behind a prompt of 1,024, for two workers: two rows of eight
    each. Cut at half of the tokens, each answer would take a row and the prompt with it."""
    policy: Policy = embedded()
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(6, 100) for _ in range(count)]

    prompt = tokens(1024)
    group = [trajectory(i, choice(tokens(64), prompt, [-1.0] * 64)) for i in range(16)]
    samples = [
        sample
        for own in prepare([art.TrajectoryGroup(group)], context=2048).samples
        for sample in own
    ]
    policy.workers = Workers(2)
    microbatches = pack(samples, 10_000, share=True, workers=policy.workers.count)
    assert [microbatch.token_count for microbatch in microbatches] == [1024 + 8 * 64] * 2
    unshared = pack(samples, 10_000, workers=policy.workers.count)
    assert [microbatch.token_count for microbatch in unshared] == [8 * 1088] * 2


def test_a_few_tokens_are_not_split_among_the_workers():
    policy: Policy = embedded()
    samples = [s for own in prepare(random_groups(policy), context=512).samples for s in own]
    policy.workers = Workers(2)
    assert len(pack(samples, 10_000, workers=policy.workers.count)) == 1


def test_what_a_worker_raises_reaches_the_caller():
    policy = embedded()
    policy.workers = Workers(2)
    with torch.no_grad():
        next(iter(policy.trainable.values())).fill_(float("nan"))
    batch = prepare(random_groups(policy), context=512)
    settings = resolve(options=dev.TrainConfig(packed_sequence_length=60, minibatches=1))
    with pytest.raises(NumericsError):
        Trainer(policy).train(batch, settings)
