"""A step of a stored run, for `gspo inspect`: its rollout batch, the weights before and after.

The run is only read, and may be training meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from gspo.backend.loading import load_trainer
from gspo.backend.stored_batch import read_batch
from gspo.core.errors import CheckpointError, RunError
from gspo.core.options import LARGEST_COUNT
from gspo.experiment.saved_run import read_run
from gspo.train.checkpoint import checkpoint_name, steps_saved
from gspo.train.settings import Settings
from gspo.train.trainer import Trainer

WEIGHTS = ("before", "after")


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


def listed(steps: Iterable[int]) -> str:
    """Steps as an error lists them.

    >>> listed([1, 4]), listed([])
    ('1, 4', 'none')
    """
    return ", ".join(map(str, steps)) or "none"
