"""`gspo export`: a checkpoint as a folder that others load, or as a repository of a hub.

model_card.md is the text of its README.md: what the model is of, how it was trained, what came of
it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import torch
from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors.torch import load_file, save_file

import gspo as art
from gspo.core.errors import ConfigError, RunError, suggestion
from gspo.core.files import explained, replacing, strict_json
from gspo.experiment.saved_run import SavedRun
from gspo.kernels.hf import quiet
from gspo.objective import PRESETS
from gspo.policy.load import read_merged
from gspo.policy.source import adapters_below, read_model, read_tokenizer, resolve
from gspo.train.checkpoint import TRAINING_FILES, verify_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ADAPTER, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Export:
    """What is written of a checkpoint, and how.

    Attributes:
        run, step: the checkpoint.
        merge: the adapter is added to the weights of its model; else an adapter stays one.
        dtype: of the weights, a key of `DTYPES`.

    Raises:
        ConfigError: a dtype that is none, a merge of what holds all weights, or an adapter that
            can only be merged.
        RunError: step 0, which is the base model.
    """

    run: SavedRun
    step: int
    merge: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        run, lora = self.run, self.run.config.get("lora")
        if self.dtype not in DTYPES:
            near = suggestion(self.dtype, DTYPES)
            raise ConfigError(f"--dtype {self.dtype!r}: give one of {', '.join(DTYPES)}.{near}")
        if self.step == 0:
            raise RunError(f"step 0 of {run.name} is its base model, {run.base_model}: use that")
        if self.merge and not lora:
            raise ConfigError(
                f"--merge: the run {run.name} has no adapter: its checkpoints hold all weights. "
                "Leave --merge out"
            )
        if lora and not self.merge and adapters_below(resolve(run.base_model))[1]:
            raise ConfigError(
                f"{run.name} trained an adapter on top of another one, {run.base_model}, which "
                "peft cannot load by itself: add --merge"
            )

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter, and not a whole model."""
        return bool(self.run.config.get("lora")) and not self.merge


def export(what: Export, to: Path | None, push_to: str | None) -> tuple[Path | None, str | None]:
    """Write a checkpoint to a folder, to a repository of the hub, or both.

    Args:
        what: the checkpoint, and how it is written.
        to: the folder, which must not hold anything; None: none stays.
        push_to: `owner/name` of the repository. A new one is private.

    Returns:
        The folder and the repository's address.

    Raises:
        ConfigError: neither is given, or a name that no repository can have.
        RunError: the folder isn't empty, cannot be written, or the hub refuses.
        CheckpointError: the checkpoint is unfinished or damaged.
    """
    if to is None and push_to is None:
        raise ConfigError("give --to DIR, --push-to OWNER/NAME, or both")
    if to is not None and (to.is_file() or (to.is_dir() and any(to.iterdir()))):
        raise RunError(f"{to} is not an empty folder: give another one to --to, or empty it")
    url = None if push_to is None else make_repository(push_to)  # a refusal costs no work
    with TemporaryDirectory() as spare:
        folder = to or Path(spare) / "export"
        write_folder(what, folder)
        if push_to is not None:
            with _of_the_hub(push_to):
                HfApi().upload_folder(
                    repo_id=push_to,
                    folder_path=folder,
                    commit_message=f"{what.run.name}, step {what.step}",
                )
    return to, url


def write_folder(what: Export, to: Path) -> None:
    """Write weights, tokenizer and model card; the folder is there whole or not at all.

    Raises:
        RunError: it cannot be written.
        CheckpointError, ModelError: the checkpoint or its base model cannot be read.
    """
    with explained(to):
        to.parent.mkdir(parents=True, exist_ok=True)
    with replacing(to) as building, what.run.reading(what.step) as checkpoint, quiet():
        verify_checkpoint(checkpoint)
        building.mkdir()
        if what.merge:
            _write_merged(what, checkpoint, building)
        else:
            for file in sorted(checkpoint.iterdir()):
                if file.name not in TRAINING_FILES:
                    shutil.copyfile(file, building / file.name)
        if what.is_adapter:
            _settle_adapter(what, building)
        elif what.dtype != "float32":
            _cast(what, building)
        (building / "README.md").write_text(model_card(what), encoding="utf-8")


def make_repository(name: str) -> str:
    """Make a repository of the hub, private, if it isn't there. Returns its address.

    Raises:
        ConfigError: no repository can have the name.
        RunError: the hub refuses, or cannot be reached.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push-to {name!r}: {error}") from None
    disable_progress_bars()
    with _of_the_hub(name):
        return str(HfApi().create_repo(name, private=True, exist_ok=True))


@contextmanager
def _of_the_hub(name: str) -> Iterator[None]:
    """Explain what the hub refuses."""
    try:
        yield
    except (HfHubHTTPError, LocalTokenNotFoundError, httpx.HTTPError) as error:
        reason = " ".join(str(error).split())
        raise RunError(
            f"cannot push to {name!r}: {reason}. Log in with a token that may write there "
            "(`hf auth login`, or HF_TOKEN), and give the command again"
        ) from None


def _write_merged(what: Export, checkpoint: Path, building: Path) -> None:
    run = what.run
    source, trust = resolve(run.base_model), run.load.trust_remote_code
    adapters = [str(checkpoint)]
    lm = read_merged(source, run.base_model, adapters=adapters, trust_remote_code=trust)
    lm.save_pretrained(building)
    read_tokenizer(str(checkpoint), trust_remote_code=trust).save_pretrained(building)


def _cast(what: Export, building: Path) -> None:
    """Round whole weights; transformers keeps in float32 what the architecture wants so."""
    trust, dtype = what.run.load.trust_remote_code, DTYPES[what.dtype]
    lm = read_model(str(building), what.run.name, trust_remote_code=trust, dtype=dtype)
    for file in building.glob("*.safetensors*"):
        file.unlink()
    lm.save_pretrained(building)


def _settle_adapter(what: Export, building: Path) -> None:
    """Round an adapter, and name its base model so that it is found from wherever it is read."""
    weights, config = building / _ADAPTER, building / _ADAPTER_CONFIG
    tensors = {name: t.to(DTYPES[what.dtype]) for name, t in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    base = resolve(what.run.base_model)
    fields = json.loads(config.read_bytes())
    fields["base_model_name_or_path"] = os.path.abspath(base) if Path(base).is_dir() else base
    config.write_text(strict_json(fields, indent=2) + "\n")


def model_card(what: Export) -> str:
    """The card of an exported step."""
    run, settings, base = what.run, what.run.settings, what.run.base_model
    rewards = {at: estimate for at, estimate in run.evaluations.items() if at <= what.step}
    warm = [1] * bool(run.spec and run.spec.sft and 1 in rewards)
    told = {*[*rewards][:1], *warm, *[*rewards][-1:]}
    # Of a folder its name, since the rest says where it lay on a machine.
    shown = Path(base).name if Path(base).is_dir() else base
    on_hub = base.count("/") == 1 and not Path(base).exists()
    method = (run.method or "").partition(",")[0]
    header = ModelCardData(
        base_model=base if on_hub else None,
        library_name="peft" if what.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["gspo", "reinforcement-learning", *([method] if method not in ("gspo", "") else [])],
    )
    return _TEMPLATES.get_template("model_card.md").render(
        what=what,
        run=run,
        header=header.to_yaml(),
        base=shown,
        preset=PRESETS.get(settings.algorithm) if settings else None,
        given=run.given | {"model": run.spec and run.spec.model},
        evaluations=[(at, rewards[at]) for at in sorted(told)],
        version=art.__version__,
    )


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
