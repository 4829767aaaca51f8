"""What ART has and gspo has not: each use says why, and what there is instead."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from gspo.core.errors import suggestion

_HERE = "gspo trains on this machine: use gspo.LocalBackend."
_STATE = "keep it in a file in the run's folder, LocalBackend(...).run(model).folder."
_LOADING = (
    "these are arguments of Unsloth, vLLM and peft. Here dev.InternalModelConfig says how a model "
    "is loaded: max_context=, dtype=, rollout_dtype=, lora=dev.LoraConfig(...)."
)

MODULES = {
    "serverless": _HERE,
    "skypilot": _HERE + " SkyPilot can run the same program elsewhere.",
    "tinker": _HERE,
    "types": "the types are names of gspo itself: gspo.Messages, gspo.Tools, ...",
    "yield_trajectory": "it is a name of gspo itself: gspo.yield_trajectory.",
}
"""Names of modules below gspo."""
NAMES = {
    "ServerlessBackend": _HERE,
    "SkyPilotBackend": _HERE,
    "TinkerBackend": _HERE,
    "types": MODULES["types"],
}
DEV: Mapping[str, str] = dict.fromkeys(
    ("EngineArgs", "InitArgs", "PeftArgs", "TrainerArgs", "OpenAIServerConfig", "ServerArgs"),
    _LOADING,
)
_PROMPTED = "it is asked, not trained: art.TrainableModel(base_model=...) is trained."
MODEL = {
    **dict.fromkeys(("train", "train_sft", "delete_checkpoints"), _PROMPTED),
    "get_inference_client": "model.openai_client() is the client.",
    "litellm_completion_params": "give litellm model='openai/' + model.get_inference_name(), "
    "base_url=model.inference_base_url and api_key=model.inference_api_key.",
    "merge_state": _STATE,
    "overwrite_state": _STATE,
    "read_state": _STATE,
    "update_wandb_config": "LocalBackend(logger=['wandb']) shows W&B the model's config.",
}
COPY = "a run is a folder, LocalBackend(...).run(model).folder: copy it with your own tools."
LOCAL_BACKEND: dict[str, str] = {
    "gpu_cost_per_hour_usd": "metrics.jsonl has time/step of each step; multiply.",
    "in_process": "everything is in this process; leave it out.",
}
BACKEND = {
    "_experimental_deploy": "a checkpoint is a folder that Hugging Face and vLLM load: "
    "result.checkpoint_path.",
    "_experimental_pull_from_s3": COPY,
    "_experimental_pull_model_checkpoint": COPY,
    "_experimental_push_to_s3": COPY,
}


def refusal(
    owner: str, name: str, reasons: Mapping[str, str], names: Iterable[str] = ()
) -> AttributeError:
    """What `owner.__getattr__` raises for a name that it has not; `names` are those that it has.

    >>> str(refusal("gspo", "ServerlessBackend", {"ServerlessBackend": "use LocalBackend."}))
    "gspo has no 'ServerlessBackend': use LocalBackend."
    """
    if name in reasons:
        return AttributeError(f"{owner} has no {name!r}: {reasons[name]}", name=name)
    near = suggestion(name, names, cutoff=0.7)
    return AttributeError(f"{owner} has no attribute {name!r}{near and '.'}{near}", name=name)


class _Finder:
    """Python asks it last, for modules that nobody else has found: those in `MODULES` say why."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        root, _, rest = name.partition(".")
        if root == "gspo" and rest in MODULES:
            raise ModuleNotFoundError(f"gspo has no module {rest!r}: {MODULES[rest]}", name=name)


sys.meta_path.append(_Finder())  # pyright: ignore[reportArgumentType]
