"""`gspo sft`: one call of `train_sft` on a file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gspo as art
from gspo.core.errors import DataError
from gspo.utils.sft import read_trajectories, train_sft_from_file


async def tune(
    data: Path,
    path: str,
    project: str,
    name: str,
    model: str,
    max_tokens: int | None,
    **options: Any,
) -> art.TrainResult:
    """Train `model`, or go on with the run of this name; `options` of `train_sft_from_file`."""
    read_trajectories(data)  # before a model is loaded or a run is begun
    config = art.dev.InternalModelConfig(max_context=max_tokens)
    tuned = art.TrainableModel(
        name=name, project=project, base_model=model, _internal_config=config
    )
    folder = Path(path).expanduser() / project / name
    begun = folder.exists()
    try:
        async with art.LocalBackend(path) as backend:
            await tuned.register(backend)
            return await train_sft_from_file(tuned, data, **options)
    except DataError:
        if not begun:  # nothing was trained: no empty run stays behind
            shutil.rmtree(folder)
        raise
