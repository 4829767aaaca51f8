"""A run's folder as `gspo inspect` reads it: stored batches, and the weights around a step."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gspo.backend.metrics_file import read_metrics
from gspo.backend.replay import StoredBatch, UpdateRecord, read_batch
from gspo.core.errors import CheckpointError, ModelError, RunError
from gspo.core.options import LARGEST_COUNT
from gspo.dev import InternalModelConfig, LoraConfig
from gspo.policy.load import load_policy
from gspo.policy.policy import Policy
from gspo.policy.probe import choose_packing
from gspo.train.checkpoint import checkpoint_name, steps_saved, verify_checkpoint
from gspo.train.settings import Settings
from gspo.train.step import Reference
from gspo.train.trainer import Trainer

Weights = Literal["before", "after"]


@dataclass
class Source:
    """A run's folder, to be read."""

    run: Path

    def __post_init__(self) -> None:
        path = self.run / "config.json"
        try:
            self.config: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError):
            raise RunError(
                f"{self.run} is not the folder of a run: it has no readable config.json. "
                "Give <path>/<project>/<name>, such as .gspo/demo/sort-1"
            ) from None
        self.batches = self.run / "trajectories" / "train"
        self.checkpoints = self.run / "checkpoints"

    def step(self, wanted: int | None) -> int:
        """The step, or the last that has a stored batch."""
        stored = self._stored()
        if not stored:
            raise RunError(f"{self.run} holds no rollout batch: it has not trained a step yet")
        if wanted is not None and wanted not in stored:
            raise RunError(f"{self.run} has no batch of step {wanted}: it has {ranges(stored)}")
        return stored[-1] if wanted is None else wanted

    def read(self, step: int) -> StoredBatch:
        """The step's batch, and how it was trained on."""
        return read_batch(self.batches / f"{checkpoint_name(step)}.parquet")

    def _stored(self) -> list[int]:
        return sorted(int(p.stem) for p in self.batches.glob("*.parquet") if p.stem.isdigit())

    def own_settings(self, record: UpdateRecord, step: int) -> Settings:
        """The settings of the step, with the clip range that was in force."""
        settings = record.settings()
        if not settings.auto_epsilon:
            return settings
        records = read_metrics(self.run / "metrics.jsonl")
        logged = next((record for record in records if record["step"] == step), {})
        low, high = logged.get("ratio/epsilon_low"), logged.get("ratio/epsilon_high")
        if low is None or high is None:
            raise RunError(f"{self.run}/metrics.jsonl lacks the clip range of step {step}")
        return replace(settings, objective=settings.objective.with_epsilon(low, high))

    def check_weights(self, step: int, wanted: tuple[Weights, ...], *, needs_before: bool) -> None:
        """Refuse weights that are gone, naming the steps that can be inspected."""
        saved, stored = steps_saved(self.checkpoints), self._stored()
        before = [s for s in stored if s == 1 or s - 1 in saved]
        after = [s for s in stored if s in saved and (not needs_before or s in before)]
        for name, there in (("before", before), ("after", after)):
            if name in wanted and step not in there:
                gone = step if name == "after" and step not in saved else step - 1
                raise RunError(
                    f"step {step} cannot be inspected with the weights {name} it: checkpoint "
                    f"{gone} is not on disk (keep_checkpoints decides how many are kept). "
                    f"There are: before: {ranges(before)}; after: {ranges(after)}. "
                    "Choose with --step and --weights"
                )

    def weights_of(self, step: int, name: Weights) -> str:
        """Where the weights come from, in words."""
        at = step - (name == "before")
        return f"checkpoint {checkpoint_name(at)}" if at else self.config["base_model"]

    def load(self, step: int, name: Weights, record: UpdateRecord) -> Policy:
        """The policy before or after a step."""
        at = step - (name == "before")
        checkpoint = self.checkpoints / checkpoint_name(at) if at else None
        version = 0
        if checkpoint is not None:
            verify_checkpoint(checkpoint)
            version = json.loads((checkpoint / "trainer.json").read_text())["policy_version"]
        if name == "before" and version != record.policy_version:
            raise CheckpointError(
                f"step {step} started from policy version {record.policy_version}, but "
                f"{self.weights_of(step, name)} is version {version}: a call of train that failed "
                "came between. Inspect it with --weights after"
            )
        lora = self.config.get("lora")
        policy = self._policy(
            record.context,
            checkpoint,
            dtype=record.dtype,
            lora=lora and LoraConfig(**lora),
        )
        choose_packing(policy)
        policy.version = version
        return policy

    def _policy(self, context: int, checkpoint: Path | None = None, **options: Any) -> Policy:
        """The run's model, loaded as the run did.

        Raises:
            RunError: it needs code of its folder, and the run does not say that this was allowed.
        """
        # A model that names no longest context has one beyond what `max_context` may be.
        longest = context if context <= LARGEST_COUNT else None
        config = InternalModelConfig(
            max_context=longest, trust_remote_code=self._trusted(), **options
        )
        try:
            return load_policy(self.config["base_model"], config, checkpoint=checkpoint)
        except ModelError as error:
            if config.trust_remote_code or "trust_remote_code" not in str(error):
                raise
            raise RunError(
                f"{self.run} cannot be inspected: base_model {self.config['base_model']!r} needs "
                "Python code of its own folder, and no spec.json of the run allows that with "
                "load.trust_remote_code = true. Only `gspo train` writes a spec.json"
            ) from error

    def _trusted(self) -> bool:
        """Whether the run was loaded with `trust_remote_code`; `gspo train` stores that."""
        path = self.run / "spec.json"
        if not path.exists():
            return False
        try:
            return json.loads(path.read_bytes())["load"]["trust_remote_code"] is True
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def reference(self, policy: Policy) -> Reference:
        """Log-probs of the base model, which a KL term is taken against."""

        def load() -> Policy:
            frozen = self._policy(policy.context)  # which may decide the RoPE
            frozen.packing, frozen.compute_dtype = policy.packing, policy.compute_dtype
            frozen.lm.requires_grad_(False)
            return frozen

        return Trainer(policy, load).reference()


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in few characters.

    >>> ranges([1, 4, 5, 6]), ranges([])
    ('1, 4-6', 'none')
    """
    runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    parts = [[number for _, number in own] for _, own in runs]
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts) or "none"
