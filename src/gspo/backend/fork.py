"""Begin a run with the weights of another one's checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from gspo import absent
from gspo.backend.base import ModelLike
from gspo.backend.run import Run
from gspo.core.errors import RunError
from gspo.core.files import explained, replacing
from gspo.train.checkpoint import checkpoint_name, steps_saved, verify_checkpoint

S3: dict[str, str] = dict.fromkeys(("from_s3_bucket", "prefix"), absent.COPY)
ARGUMENTS = ("model", "from_model", "from_project", "not_after_step", "verbose")


def fork_checkpoint(
    path: Path,
    model: ModelLike,
    from_model: str,
    from_project: str | None = None,
    not_after_step: int | None = None,
) -> int:
    """Copy a checkpoint into the run of a model that is not registered yet; returns its step.

    The step, the optimizer and the steered epsilon come with it; metrics and trajectories don't.
    The new run's config.json says which runs and steps it goes on from, back to the first.

    Args:
        path: of the backend, which has both runs.
        model: goes on from the checkpoint when it is registered.
        from_model, from_project: name the other run; its project is the model's by default.
        not_after_step: the last checkpoint up to this step is taken; None: the last one.

    Raises:
        RunError: there is no such checkpoint, it is of another base model, or the model has
            checkpoints of its own.
        CheckpointError: it is damaged.
    """
    source = path / (from_project or model.project) / from_model
    saved = steps_saved(source / "checkpoints")
    fitting = [step for step in saved if not_after_step is None or step <= not_after_step]
    if not fitting:
        limit = "" if not_after_step is None else f" up to step {not_after_step}"
        told = f"it has the steps {saved}" if saved else "it has none at all"
        raise RunError(f"{source} has no checkpoint{limit}: {told}")
    checkpoint = source / "checkpoints" / checkpoint_name(fitting[-1])
    identity = run_identity(model)
    stored = json.loads((source / "config.json").read_bytes())
    for key, value in identity.items():
        if stored.get(key) != value:
            raise RunError(
                f"{source} is a run with {key} {stored.get(key)!r}, and {model.name!r} has "
                f"{value!r}: a checkpoint fits only the model that it is of"
            )
    verify_checkpoint(checkpoint)
    run = Run(path, model.project, model.name, identity)
    try:
        if own := steps_saved(run.checkpoints):
            raise RunError(
                f"{run.folder} has the checkpoints of steps {own} already: "
                "give the model another name"
            )
        target = run.checkpoints / checkpoint.name
        with run.writing(), explained(target), replacing(target) as building:
            shutil.copytree(checkpoint, building)
        parent = {"run": f"{source.parent.name}/{source.name}", "step": fitting[-1]}
        run.claim([*stored.get("lineage", []), parent])
    finally:
        run.close()
    return fitting[-1]


def run_identity(model: ModelLike) -> dict[str, object]:
    """What must not change over a run's life."""
    lora = model.internal_config.lora
    return {"base_model": model.source, "lora": lora and lora.model_dump()}
