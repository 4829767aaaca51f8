"""The gradients of several methods at once: each equals what training would compute alone."""

from __future__ import annotations

import pytest
import torch

from gspo import dev
from gspo.core.errors import DataError
from gspo.data.packing import pack
from gspo.lab.gradients import MethodLoss, cosines, gram, measure
from gspo.objective import PRESETS, policy_loss
from gspo.policy.policy import Policy
from gspo.train.minibatches import RolloutBatch, prepare
from gspo.train.settings import Settings, resolve
from support import embedded, gradient_of, random_groups


@pytest.fixture(scope="module")
def policy() -> Policy:
    return embedded()


@pytest.fixture(scope="module")
def groups(policy: Policy):
    """Old log-probs near the policy's own, so that every method clips some and not all."""
    out = random_groups(policy, groups=4)
    for trajectory in out[3]:
        trajectory.reward = 0.5
    batch = prepare(out, context=policy.context)
    (row,) = pack([s for own in batch.samples for s in own], 10_000)

    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        scored = policy.logprobs(row).logprobs
    spread = 0.3 * torch.randn(len(scored), generator=noise)
    old = (scored - spread).clamp(max=0.0)
    at = 0
    for trajectory in (t for group in out for t in group):
        (choice,) = trajectory.choices()
        size = len(choice.token_ids)  # pyright: ignore[reportAttributeAccessIssue]
        choice.token_logprobs = old[at : at + size].tolist()  # pyright: ignore
        at += size
    return out


def settings_of(name: str, **options) -> Settings:
    return resolve(options=dev.TrainConfig(algorithm=name, **options))  # pyright: ignore


def batch_of(policy: Policy, groups, settings: Settings) -> RolloutBatch:
    return prepare(groups, context=policy.context, advantage=settings.advantage)


def measured(policy: Policy, groups, settings: dict[str, Settings], budget: int = 64, **options):
    losses = {n: MethodLoss.of(batch_of(policy, groups, s), s) for n, s in settings.items()}
    every = batch_of(policy, groups, next(iter(settings.values()))).samples
    given = next(iter(settings.values()))
    return losses, measure(policy, every, losses, given, budget, **options)


def naive(policy: Policy, groups, settings: Settings) -> tuple[float, list[torch.Tensor]]:
    """One forward of the whole model a sample, full logits, one loss, one backward."""
    batch = batch_of(policy, groups, settings)
    counted = batch if settings.preset.counts_flat else batch.with_signal()
    logprobs, old, ids, advantages = [], [], [], []
    for (sample,) in counted.samples:
        tokens = torch.from_numpy(sample.tokens)[None]
        scored = policy.lm(input_ids=tokens).logits[0, :-1].log_softmax(-1)
        mask = torch.from_numpy(sample.ratio_mask)
        logprobs.append(scored.gather(-1, tokens[0, 1:, None]).squeeze(-1)[mask[1:]])
        old.append(torch.from_numpy(sample.old_logprobs)[mask])
        ids.append(torch.full((sample.sampled,), len(advantages)))
        advantages.append(sample.advantage)
    out = policy_loss(
        torch.cat(logprobs),
        torch.cat(old),
        torch.cat(ids),
        torch.tensor(advantages),
        settings.objective,
    )
    parameters = list(policy.trainable.values())
    found = torch.autograd.grad(out.loss, parameters, allow_unused=True)
    return out.loss.item(), [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
    ]


def test_all_at_once_equal_a_naive_loop_for_each(policy: Policy, groups):
    methods = {name: settings_of(name) for name in PRESETS}
    losses, products = measured(policy, groups, methods)
    for i, (name, settings) in enumerate(methods.items()):
        loss, expected = naive(policy, groups, settings)
        assert losses[name].policy == pytest.approx(loss, rel=1e-4, abs=1e-6), name
        scale = max(part.abs().max().item() for part in expected)
        assert scale > 0
        for got, part in zip(losses[name].gradient, expected, strict=True):
            torch.testing.assert_close(got, part, rtol=1e-4, atol=1e-5 * scale, msg=name)
        square = sum(part.double().square().sum().item() for part in expected)
        assert products[i, i].item() == pytest.approx(square, rel=1e-4)
    clipping = [n for n in methods if losses[n].clipped_tokens]
    assert {"gspo", "gspo_token", "grpo", "dr_grpo", "dapo", "luspo"} <= set(clipping)
    matrix = cosines(products)
    names = list(methods)
    pair = matrix[names.index("gspo")][names.index("grpo")]
    assert pair is not None and pair < 0.99


def test_statistics_are_those_of_a_training_step(policy: Policy, groups):
    for name in PRESETS:
        settings = settings_of(name)
        losses, products = measured(policy, groups, {name: settings})
        batch = batch_of(policy, groups, settings)
        gradient, known = gradient_of(policy, batch, settings)
        norm = torch.nn.utils.get_total_norm(list(gradient.values()))
        one = losses[name]
        assert one.policy == pytest.approx(known["loss/policy"], rel=1e-5, abs=1e-7), name
        assert products[0, 0].sqrt().item() == pytest.approx(norm.item(), rel=1e-4), name
        assert one.clipped / one.scored == pytest.approx(known["ratio/clip_fraction"]), name
        tokens = one.clipped_tokens / one.scored_tokens
        assert tokens == pytest.approx(known["ratio/clip_fraction_tokens"]), name
        mean = sum(one.log_ratios) / len(one.log_ratios)
        assert mean == pytest.approx(known["ratio/log_mean"], rel=1e-4), name


def test_sequence_and_sequence_token_point_the_same_way(policy: Policy, groups):
    methods = {name: settings_of(name) for name in ("gspo", "gspo_token")}
    _, products = measured(policy, groups, methods)
    (_, pair), _ = cosines(products)
    assert pair == pytest.approx(1.0, abs=1e-6)
    assert products[0, 0].item() == pytest.approx(products[1, 1].item(), rel=1e-5)


def test_nothing_depends_on_the_rows_or_on_the_company(policy: Policy, groups):
    methods = {name: settings_of(name) for name in ("gspo", "dapo", "reinforce")}
    whole, products = measured(policy, groups, methods, budget=10_000)
    for budget in (1, 100):
        split, again = measured(policy, groups, methods, budget=budget)
        torch.testing.assert_close(again, products, rtol=1e-4, atol=1e-9)
        for name in methods:
            assert split[name].clipped == pytest.approx(whole[name].clipped)
            assert split[name].scored_tokens == whole[name].scored_tokens
    # REINFORCE alone needs the flat group's forward pass; the others don't notice it.
    assert whole["reinforce"].scored == 16 and whole["gspo"].scored == 12
    alone, product = measured(policy, groups, {"gspo": methods["gspo"]})
    assert product[0, 0].item() == pytest.approx(products[0, 0].item(), rel=1e-4)
    assert alone["gspo"].policy == pytest.approx(whole["gspo"].policy, rel=1e-5)


def test_a_kl_term_needs_every_sequence(policy: Policy, groups):
    methods = {n: settings_of(n, kl_penalty_coef=0.1) for n in ("gspo", "grpo")}

    def reference(row):
        return row.old_logprobs

    losses, products = measured(policy, groups, methods, reference=reference)
    free, without = measured(policy, groups, {"gspo": settings_of("gspo")})
    assert losses["gspo"].scored == 12  # as without a KL term: the flat group can't be clipped
    assert losses["gspo"].clipped == free["gspo"].clipped
    assert losses["gspo"].kl == pytest.approx(losses["grpo"].kl) and losses["gspo"].kl > 0
    assert losses["gspo"].policy == pytest.approx(free["gspo"].policy, abs=1e-6)
    assert products[0, 0].item() != pytest.approx(without[0, 0].item(), rel=1e-3)


def test_parameters_keep_their_own_gradients(policy: Policy, groups):
    name, parameter = next(iter(policy.trainable.items()))
    parameter.grad = torch.full_like(parameter, 7.0)
    measured(policy, groups, {"gspo": settings_of("gspo")})
    assert (parameter.grad == 7.0).all(), name
    policy.lm.zero_grad(set_to_none=True)


def test_a_replay_without_expert_choices_is_refused(policy: Policy, groups):
    replaying = settings_of("gspo", routing_replay="rollout")
    with pytest.raises(DataError, match="without expert choices"):
        measured(policy, groups, {"gspo": replaying})


def test_no_method_has_a_gradient_on_flat_groups(policy: Policy, groups):
    flat = groups[3:]
    losses, products = measured(policy, flat, {n: settings_of(n) for n in ("gspo", "dapo")})
    assert products.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert cosines(products) == [[None, None], [None, None]]
    assert (losses["gspo"].sequences, losses["dapo"].sequences) == (4, 0)


def test_the_dot_products_are_exact_where_float32_is_not():
    big = torch.full((3_000_000,), 1.0)
    small = torch.full((3_000_000,), 1e-4)
    assert gram([[big, big], [small, small]])[0, 1].item() == pytest.approx(
        6e6 * float(small[0]), rel=1e-12
    )
