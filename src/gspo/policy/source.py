"""Find and read a model by its name, folder or hub id.

No pickle is loaded, and no code of a model folder is run unless `trust_remote_code=True` asks for
it: there is no question at the terminal.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub.constants import ENDPOINT
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gspo.core.errors import ModelError, suggestion
from gspo.kernels.hf import quiet
from gspo.policy.embedded import PREFIX, RECIPES, embedded_folder

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_REFUSALS = (OSError, ValueError, ImportError, AttributeError, KeyError, SafetensorError)


def resolve(base_model: str) -> str:
    """Find the folder or hub id to load from.

    Raises:
        ModelError: no such embedded model, no such folder, or a folder with an adapter only.
    """
    if base_model.startswith(PREFIX):
        return str(embedded_folder(base_model))
    folder = Path(base_model)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ModelError(
            f"base_model {base_model!r} is a LoRA adapter, not a model. Merge it into its model: "
            "peft.AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()"
            ".save_pretrained(new_folder), and copy the tokenizer into new_folder"
        )
    is_path = base_model.startswith((".", "/", "~")) or base_model.count("/") != 1
    if is_path and not folder.is_dir():
        near = suggestion(base_model, [PREFIX + name for name in RECIPES])
        raise ModelError(
            f"unknown base_model {base_model!r}: it is not a folder.{near} Give a folder in "
            "Hugging Face layout, a hub id such as 'Qwen/Qwen3-0.6B', or 'embedded:sort'."
        )
    return base_model


def read_config(source: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read the model's config.

    Raises:
        ModelError: it cannot be read, or asks for code of the folder.
    """
    return _read(AutoConfig, source, trust_remote_code)


def read_tokenizer(source: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Read the model's tokenizer.

    Raises:
        ModelError: there is none, or it asks for code of the folder.
    """
    return _read(AutoTokenizer, source, trust_remote_code)


def read_model(path: str, source: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Read a causal LM in float32.

    Args:
        path: folder or hub id of the weights.
        source: what the user calls the model.
        trust_remote_code: run code of the folder, if its config asks for it.

    Raises:
        ModelError: unknown model or architecture, pickled or quantized weights.
    """
    check_no_pickles(path)
    options = {"dtype": torch.float32, "use_safetensors": True}
    lm = _read(AutoModelForCausalLM, path, trust_remote_code, source, **options)
    if getattr(lm, "is_quantized", False):
        raise ModelError(f"{source!r} holds quantized weights; dequantize it to train it")
    return lm


def check_no_pickles(path: str) -> None:
    """Refuse a folder whose only weights are pickles, which can run code when they are read.

    Raises:
        ModelError: there is a pickle and no safetensors file.
    """
    files = sorted(Path(path).glob("*"))
    pickled = next((file.name for file in files if file.suffix in _PICKLES), None)
    if pickled is not None and not any(file.suffix == ".safetensors" for file in files):
        raise ModelError(
            f"{path!r} has its weights in {pickled}, a pickle, which gspo never loads. If you "
            "trust it, convert it with transformers: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder), which writes safetensors; then copy the tokenizer"
        )


def _read(auto: Any, path: str, trust_remote_code: bool, name: str = "", **options: Any) -> Any:
    """Call `from_pretrained`; an error becomes a ModelError that calls the model `name`."""
    is_folder = Path(path).is_dir()
    # A hub that cannot be reached is not asked again and again: its cache is searched.
    options |= {"local_files_only": not is_folder and not _hub_answers()}
    try:
        with quiet():
            return auto.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
    except _REFUSALS as error:
        hint = "" if is_folder else " (hub ids need the network or its cache)"
        reason = f"{hint}: {error}"
        if "trust_remote_code" in str(error):
            reason = (
                ", which needs Python code of its own folder. gspo runs none unless you set "
                "trust_remote_code=True, after you have read it"
            )
        what = "the tokenizer of " if auto is AutoTokenizer else ""
        raise ModelError(f"cannot load {what}base_model {name or path!r}{reason}") from error


def _hub_answers() -> bool:
    try:
        # A proxy, if there is one, resolves names itself.
        return bool(getproxies() or socket.getaddrinfo(urlsplit(ENDPOINT).hostname, 443))
    except OSError:
        return False
