"""The README.md of an exported model: what it is of, how it was trained, and what came of it.

model_card.md is its text.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import gspo as art
from gspo.experiment.run_file import flat
from gspo.experiment.run_table import method_name
from gspo.experiment.saved_run import SavedRun
from gspo.objective import PRESETS


def model_card(run: SavedRun, step: int, *, adapter: bool, dtype: str) -> str:
    """The card of a saved step.

    Args:
        run, step: the checkpoint.
        adapter: it stays an adapter; else it is a whole model.
        dtype: of the weights.
    """
    method, settings = method_name(run), run.settings
    rewards = {at: estimate for at, estimate in run.evaluations.items() if at <= step}
    warm = [1] * bool(run.spec and run.spec.sft and 1 in rewards)
    told = {*[*rewards][:1], *warm, *[*rewards][-1:]}
    given = flat(run.spec.model_dump(mode="json", exclude_defaults=True)) if run.spec else {}
    folder = Path(run.base_model)
    return _TEMPLATES.get_template("model_card.md").render(
        header=_header(run, adapter, (method or "").partition(",")[0]),
        name=run.folder.resolve().name,
        # Of a folder its name, since the rest says where it lay on a machine.
        base=folder.name if folder.is_dir() else run.base_model,
        lora=run.config.get("lora"),
        adapter=adapter,
        dtype=dtype,
        method=method,
        settings=settings,
        preset=PRESETS.get(settings.algorithm) if settings else None,
        run=run,
        step=step,
        spec=run.spec,
        given=given | {"model": run.spec and run.spec.model},
        evaluations=[(at, rewards[at]) for at in sorted(told)],
        version=art.__version__,
    )


def _header(run: SavedRun, adapter: bool, method: str) -> str:
    base = run.base_model
    on_hub = base.count("/") == 1 and not Path(base).exists()
    tags = ["gspo", "reinforcement-learning", *([method] if method not in ("gspo", "") else [])]
    return ModelCardData(
        base_model=base if on_hub else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
    ).to_yaml()


def _without_folders(value: Any) -> Any:
    """A value, of whose paths the folders are left out: a card is read by others."""
    if isinstance(value, list):
        return [*map(_without_folders, value)]
    if not isinstance(value, str):
        return value
    value = Path(value).name if value.startswith("/") and Path(value).is_dir() else value
    return re.sub(r"^(?:[^:\s]*/)?([^/:]+\.\w+(?::\w+)?)$", r"\1", value)


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters |= {"public": _without_folders, "json": partial(json.dumps, ensure_ascii=False)}
