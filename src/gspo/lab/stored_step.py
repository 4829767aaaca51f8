"""A step of a stored run, for `gspo inspect`: its rollout batch, the weights before and after it.

And the gradient that a method steps along there: loss and gradient are those of the training step
itself; only the optimizer is left out. The run is only read, and may be training meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.backend.loading import load_trainer
from gspo.backend.stored_batch import read_batch
from gspo.core.errors import CheckpointError, RunError
from gspo.core.options import LARGEST_COUNT
from gspo.experiment.saved_run import listed, read_run
from gspo.train.checkpoint import checkpoint_name, steps_saved
from gspo.train.expert_replay import ExpertReplay
from gspo.train.minibatches import RolloutBatch
from gspo.train.observe import Observer
from gspo.train.settings import Settings
from gspo.train.trainer import Call, Trainer

WEIGHTS = ("before", "after")
_SLICE = 1 << 20  # elements of a parameter that are multiplied in float64 at once


class StoredStep:
    """One call of `train` of a run.

    Args:
        folder: of the run.
        number: of the step; None: the last that has a stored batch.

    Attributes:
        number: of the step.
        groups: the rollout batch.
        record: how the batch was trained on.

    Raises:
        RunError: no run, no such step, or a batch that cannot be read.
    """

    def __init__(self, folder: Path, number: int | None = None):
        run = read_run(folder)
        if run is None:
            raise RunError(
                f"{folder} is not the folder of a run: it has no readable config.json. "
                "Give <path>/<project>/<name>, such as .gspo/demo/sort-1"
            )
        self.run, steps = run, [*run.batches]
        if not steps:
            raise RunError(f"{folder} holds no rollout batch: it has not trained a step yet")
        self.number = steps[-1] if number is None else number
        if self.number not in steps:
            raise RunError(
                f"{folder} has no batch of step {number}: it has those of {steps[0]} to {steps[-1]}"
            )
        self.groups, self.record = read_batch(run.batches[self.number])

    def settings(self) -> Settings:
        """The settings of the step, with the clip range that was in force."""
        settings = self.record.settings()
        if settings.epsilon != "auto":
            return settings
        ends = ("ratio/epsilon_low", "ratio/epsilon_high")
        low, high = (self.run.values(end).get(self.number) for end in ends)
        if low is None or high is None:
            raise RunError(
                f"{self.run.folder}/metrics.jsonl lacks the clip range of step {self.number}"
            )
        return settings.with_objective(settings.objective.with_epsilon(low, high))

    def check_weights(self, wanted: Sequence[str], *, needs_before: bool) -> None:
        """Refuse weights that are gone, naming the steps that can be inspected."""
        step, saved = self.number, steps_saved(self.run.folder / "checkpoints")
        before = [s for s in self.run.batches if s == 1 or s - 1 in saved]
        after = [s for s in self.run.batches if s in saved and (not needs_before or s in before)]
        for name, usable in zip(WEIGHTS, (before, after), strict=True):
            if name in wanted and step not in usable:
                gone = step if name == "after" and step not in saved else step - 1
                raise RunError(
                    f"step {step} cannot be inspected with the weights {name} it: checkpoint "
                    f"{gone} is not on disk (keep_checkpoints decides how many are kept). "
                    f"There are: before: {listed(before)}; after: {listed(after)}. "
                    "Choose with --step and --weights"
                )

    def weights_of(self, name: str) -> str:
        """Where the weights come from, in words."""
        number = self.number - (name == "before")
        return f"checkpoint {checkpoint_name(number)}" if number else self.run.base_model

    def load(self, name: str) -> Trainer:
        """The trainer as it was before or after the step, with the model of its KL term.

        Raises:
            CheckpointError: a damaged checkpoint, or one of another policy version.
            ModelError: the model needs code of its folder, which the run's spec.json doesn't allow.
        """
        number, record = self.number - (name == "before"), self.record
        # The context may decide the RoPE. A model that names no longest one has one beyond what
        # `max_context` may be.
        context = record.context if record.context <= LARGEST_COUNT else None
        config = self.run.load.model_copy(update={"dtype": record.dtype, "max_context": context})
        checkpoint = self.run.folder / "checkpoints" / checkpoint_name(number) if number else None
        trainer = load_trainer(self.run.base_model, config, checkpoint)
        version = trainer.policy.version
        if name == "before" and version != record.policy_version:
            raise CheckpointError(
                f"step {self.number} started from policy version {record.policy_version}, but "
                f"{self.weights_of(name)} is version {version}: a call of train that failed "
                "came between. Inspect it with --weights after"
            )
        return trainer


def method_gradient(
    trainer: Trainer, batch: RolloutBatch, settings: Settings
) -> tuple[Observer, list[Tensor]]:
    """What training would observe, and its gradient, if the batch were one minibatch.

    Args:
        trainer: its policy's weights stay as they are.
        batch: has the advantages, old log-probs and expert choices that `settings` ask for.
        settings: of the method. The load-balancing loss of a router is left out.

    Returns:
        The metrics and traces; the gradient as one tensor per trained parameter, of 0 if nothing in
        the batch has a gradient.

    Raises:
        DataError: expert choices are to be replayed, and a sample has none.
        NumericsError: the loss is not finite.
    """
    policy = trainer.policy
    policy.lm.eval()
    settings = settings.model_copy(update={"router_aux_loss_coef": 0.0})
    observer = Observer(policy, batch)
    call = Call(
        settings, [batch.samples], ExpertReplay(policy, settings, observer.metrics), observer
    )
    trainer.gradient(batch.samples, call)
    parameters = policy.trainable.values()
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    trainer.optimizer.clear()
    return observer, gradient


def gram(gradients: Sequence[Sequence[Tensor]]) -> Float[Tensor, "P P"]:
    """Dot products of P gradients, each a list of tensors, summed in float64.

    >>> gram([[torch.tensor([3.0, 4.0])], [torch.tensor([1.0, 0.0])]]).tolist()
    [[25.0, 3.0], [3.0, 1.0]]
    """
    total = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for tensors in zip(*gradients, strict=True):
        flat = [tensor.detach().reshape(-1).split(_SLICE) for tensor in tensors]
        for pieces in zip(*flat, strict=True):
            block = torch.stack(pieces).double()
            total += (block @ block.t()).cpu()
    return (total + total.t()) / 2  # a product's two triangles may be rounded apart


def cosines(products: Float[Tensor, "P P"]) -> list[list[float | None]]:
    """Cosine of each pair of gradients from their dot products; None if one of the two is 0.

    >>> cosines(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    [[1.0, None], [None, None]]
    """
    norms = products.diag().sqrt()
    matrix = (products / norms.outer(norms)).clamp(-1, 1).tolist()
    return [[None if math.isnan(value) else value for value in values] for values in matrix]
