"""The clip at its very edge, and a surrogate that is registered from outside the package."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gspo import dev
from gspo.core.errors import ConfigError
from gspo.objective import Objective, Terms, clipped_surrogate, policy_loss, register_surrogate
from gspo.objective.surrogates import SURROGATES
from gspo.train.minibatches import prepare
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer
from support import embedded, random_groups

LOW, HIGH = 3e-4, 4e-4
MAGNITUDES = torch.linspace(0.01, 3.0, 500)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_free_at_the_edge_and_silent_one_rounding_beyond(sign: float, dtype: torch.dtype) -> None:
    advantage = (sign * MAGNITUDES).to(dtype)
    edge = torch.tensor(1 + HIGH if sign > 0 else 1 - LOW, dtype=dtype).expand_as(advantage)
    beyond = edge.nextafter(edge + sign)
    for ratio, silent in ((edge, False), (beyond, True)):
        ratio = ratio.clone().requires_grad_()
        value, clipped = clipped_surrogate(ratio, advantage, LOW, HIGH)
        value.sum().backward()
        assert clipped.tolist() == [silent] * len(advantage)
        assert value.tolist() == (edge * advantage).tolist()
        assert ratio.grad is not None
        assert ratio.grad.tolist() == ([0.0] * len(advantage) if silent else advantage.tolist())


# A surrogate of the user's own


def soft_clip(terms: Terms) -> tuple[Tensor, None]:
    """The ratio's distance from 1, bounded by tanh in place of the clip."""
    width = terms.constants["width"]
    moved = width * torch.tanh((terms.ratio - 1) / width)
    assert terms.advantages is not None
    return torch.where(terms.segments.lengths > 0, moved * terms.advantages, 0.0), None


@pytest.fixture
def mine() -> Iterator[str]:
    register_surrogate("mine", soft_clip, has_range=False, constants=["width"], levels=["sequence"])
    yield "mine"
    del SURROGATES["mine"]


def own_objective(**changed: Any) -> Objective:
    fields: dict[str, Any] = {"surrogate": "mine", "constants": {"width": 0.1}} | changed
    return Objective("sequence", 1.0, 1.0, **fields)


def test_it_is_one_call_and_no_option_has_to_know_it(mine: str) -> None:
    objective = own_objective()
    assert (objective.has_range, objective.per_sequence, objective.exponent) == (
        False, True, "sequence",
    )  # fmt: skip
    new = torch.tensor([-0.9, -1.1, -2.0], requires_grad=True)
    old, ids = torch.tensor([-1.0, -1.0, -2.5]), torch.tensor([0, 0, 1])
    out = policy_loss(new, old, ids, torch.tensor([1.0, -2.0]), objective)
    (gradient,) = torch.autograd.grad(out.loss, new)
    moved = 0.1 * math.tanh((math.exp(0.5) - 1) / 0.1)
    assert out.loss.item() == pytest.approx(-(0.0 - 2 * moved) / 2, rel=1e-5)
    assert gradient[:2].tolist() == pytest.approx([-1 / 2 / 2] * 2, rel=1e-5)
    assert not out.clipped_tokens.any()


def test_what_it_does_not_take_is_refused(mine: str) -> None:
    with pytest.raises(ValueError, match="takes ratios of the level 'sequence', not 'token'"):
        replace(own_objective(), level="token")
    with pytest.raises(ValueError, match="'mine' has the constants width, but none were given"):
        own_objective(constants={})
    with pytest.raises(ValueError, match="surrogate 'clip' is built in"):
        register_surrogate("clip", soft_clip, has_range=True)
    options = dev.TrainConfig(algorithm=own_objective(), epsilon=0.1)
    with pytest.raises(ConfigError, match="no clip range: leave epsilon out"):
        resolve(options=options)


def test_it_trains_and_its_stored_options_are_read_again(mine: str) -> None:
    options = dev.TrainConfig(algorithm=own_objective(), minibatches=2)
    settings = resolve(options=dev.TrainConfig(**options.model_dump(mode="json")))
    assert settings.objective == own_objective()
    policy = embedded()
    before = {n: p.detach().clone() for n, p in policy.trainable.items()}
    out = Trainer(policy).train(prepare(random_groups(policy), context=512), settings)
    metrics = out.metrics.compute()
    assert out.updates == 2
    assert metrics["ratio/clip_fraction"] == 0
    assert "ratio/epsilon_low" not in metrics
    assert any(not torch.equal(p, before[n]) for n, p in policy.trainable.items())


def test_a_process_that_did_not_register_it_says_so() -> None:
    with pytest.raises(ValueError, match=r"unknown surrogate 'mine': .*register_surrogate"):
        own_objective()
