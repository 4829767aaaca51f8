"""A step of a stored run, for `gspo inspect`: its rollout batch, the weights before and after.

The run is only read, and may be training meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gspo.backend.stored_batch import read_batch
from gspo.core.errors import CheckpointError, RunError
from gspo.core.options import LARGEST_COUNT
from gspo.dev import InternalModelConfig, LoraConfig
from gspo.experiment.saved_run import read_run
from gspo.policy.load import load_policy
from gspo.policy.policy import Policy
from gspo.policy.probe import choose_packing
from gspo.train.checkpoint import checkpoint_name, steps_saved, verify_checkpoint
from gspo.train.settings import Settings
from gspo.train.trainer import Trainer

WEIGHTS = ("before", "after")


class StoredStep:
    """One call of `train` of a run.

    Args:
        run: folder of the run.
        number: of the step; None: the last that has a stored batch.

    Attributes:
        number: of the step.
        groups: the rollout batch.
        record: how the batch was trained on.

    Raises:
        RunError: no run, no such step, or a batch that cannot be read.
    """

    def __init__(self, run: Path, number: int | None = None):
        self.run = run
        saved = read_run(run)
        if saved is None:
            raise RunError(
                f"{run} is not the folder of a run: it has no readable config.json. "
                "Give <path>/<project>/<name>, such as .gspo/demo/sort-1"
            )
        self._data, self._batches, self._base_model = saved, saved.batches, saved.base_model
        if not self._batches:
            raise RunError(f"{run} holds no rollout batch: it has not trained a step yet")
        self.number = max(self._batches) if number is None else number
        if self.number not in self._batches:
            first, last = min(self._batches), max(self._batches)
            raise RunError(
                f"{run} has no batch of step {number}: it has those of {first} to {last}"
            )
        batch = read_batch(self._batches[self.number])
        self.groups, self.record = batch.groups, batch.record

    def settings(self) -> Settings:
        """The settings of the step, with the clip range that was in force."""
        settings = self.record.settings()
        if settings.epsilon != "auto":
            return settings
        logged = next((line for line in self._data.records if line["step"] == self.number), {})
        low, high = logged.get("ratio/epsilon_low"), logged.get("ratio/epsilon_high")
        if low is None or high is None:
            raise RunError(f"{self.run}/metrics.jsonl lacks the clip range of step {self.number}")
        return settings.with_objective(settings.objective.with_epsilon(low, high))

    def check_weights(self, wanted: Sequence[str], *, needs_before: bool) -> None:
        """Refuse weights that are gone, naming the steps that can be inspected."""
        step, saved = self.number, steps_saved(self.run / "checkpoints")
        before = [s for s in self._batches if s == 1 or s - 1 in saved]
        after = [s for s in self._batches if s in saved and (not needs_before or s in before)]
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
        return f"checkpoint {checkpoint_name(number)}" if number else self._base_model

    def load(self, name: str) -> Policy:
        """The policy before or after the step.

        Raises:
            CheckpointError: a damaged checkpoint, or one of another policy version.
            ModelError: the model needs code of its folder, which the run's spec.json doesn't allow.
        """
        number = self.number - (name == "before")
        checkpoint, version = None, 0
        if number:
            checkpoint = self.run / "checkpoints" / checkpoint_name(number)
            verify_checkpoint(checkpoint)
            version = json.loads((checkpoint / "trainer.json").read_text())["policy_version"]
        if name == "before" and version != self.record.policy_version:
            raise CheckpointError(
                f"step {self.number} started from policy version {self.record.policy_version}, but "
                f"{self.weights_of(name)} is version {version}: a call of train that failed "
                "came between. Inspect it with --weights after"
            )
        lora = self._data.config.get("lora")
        options = {"dtype": self.record.dtype, "lora": lora and LoraConfig(**lora)}
        policy = self._policy(self._base_model, self.record.context, checkpoint, **options)
        choose_packing(policy)
        policy.round_weights()
        policy.version = version
        return policy

    def trainer(self, policy: Policy) -> Trainer:
        """A trainer of the policy, with the model that a KL term is against."""

        def load(name: str | None) -> Policy:
            # the context may decide the RoPE
            frozen = self._policy(name or self._base_model, policy.context)
            choose_packing(frozen)
            frozen.dtype = policy.dtype
            frozen.round_weights()
            frozen.lm.requires_grad_(False)
            return frozen

        return Trainer(policy, load)

    def _policy(
        self, name: str, context: int, checkpoint: Path | None = None, **options: Any
    ) -> Policy:
        # A model that names no longest context has one beyond what `max_context` may be.
        longest = context if context <= LARGEST_COUNT else None
        trusted = self._data.options.get("load.trust_remote_code") is True
        config = InternalModelConfig(max_context=longest, trust_remote_code=trusted, **options)
        return load_policy(name, config, checkpoint=checkpoint)


def listed(steps: Iterable[int]) -> str:
    """Steps as an error lists them.

    >>> listed([1, 4]), listed([])
    ('1, 4', 'none')
    """
    return ", ".join(map(str, steps)) or "none"
