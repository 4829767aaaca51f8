"""Find and read a model by its name, folder or hub id.

No pickle is loaded, and no code of a model folder is run unless `trust_remote_code=True` asks for
it: there is no question at the terminal.
"""

from __future__ import annotations

import json
import socket
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants
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

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_REFUSALS = (OSError, ValueError, ImportError, AttributeError, KeyError, SafetensorError)


def resolve(base_model: str) -> str:
    """Find the folder or hub id to load from.

    Raises:
        ModelError: no such embedded model, no such folder, or a folder without a whole model.
    """
    if base_model.startswith(PREFIX):
        return str(embedded_folder(base_model))
    folder = Path(base_model)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ModelError(f"base_model {base_model!r}: {_without_config(folder)}")
        return base_model
    near = suggestion(base_model, [PREFIX + name for name in RECIPES])
    if base_model.startswith((".", "/", "~")) or base_model.count("/") != 1:
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
    return _read(AutoTokenizer, source, trust_remote_code, what="the tokenizer of ")


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
    config = read_config(path, trust_remote_code=trust_remote_code)
    options = {"config": config, "dtype": torch.float32, "use_safetensors": True}
    lm = _read(AutoModelForCausalLM, path, trust_remote_code, name=source, **options)
    if getattr(lm, "is_quantized", False):
        raise ModelError(f"{source!r} holds quantized weights; dequantize it to train it")
    return lm


def _read(
    auto: Any, path: str, trust_remote_code: bool, *, name: str = "", what: str = "", **options: Any
) -> Any:
    """Call `from_pretrained`; an error becomes a ModelError that calls the model `name`."""
    name, is_folder = name or path, Path(path).is_dir()
    options |= {
        "trust_remote_code": trust_remote_code,
        # A hub that cannot be reached is not asked again and again: its cache is searched.
        "local_files_only": not is_folder and not _hub_answers(),
    }
    with quiet():
        try:
            return auto.from_pretrained(path, **options)
        except _REFUSALS as error:
            if "trust_remote_code" in str(error):
                raise ModelError(
                    f"base_model {name!r} needs Python code of its own folder. gspo runs none "
                    "unless you set trust_remote_code=True, after you have read it"
                ) from error
            hint = "" if is_folder else " (hub ids need the network or its cache)"
            raise ModelError(f"cannot load {what}base_model {name!r}{hint}: {error}") from error


def check_no_pickles(path: str) -> None:
    """Refuse a folder whose only weights are pickles, which can run code when they are read.

    Raises:
        ModelError: there is a pickle and no safetensors file.
    """
    folder = Path(path)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = next((file for kind in _PICKLES for file in sorted(folder.glob(kind))), None)
    if pickled is not None:
        raise ModelError(
            f"{path!r} has its weights in {pickled.name}, a pickle, which gspo never loads. If you "
            "trust it, convert it with transformers: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder), which writes safetensors; then copy the tokenizer"
        )


def _hub_answers() -> bool:
    if urllib.request.getproxies():
        return True  # the proxy resolves names
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        return False
    return True


def _without_config(folder: Path) -> str:
    """Say why a folder without config.json is no model."""
    adapter = folder / "adapter_config.json"
    if not adapter.exists():
        return "the folder has no config.json"
    try:
        base = json.loads(adapter.read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = "another model"
    return (
        f"the folder holds a LoRA adapter of {base!r}, not a model. Merge the two first: "
        "peft.AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()"
        ".save_pretrained(new_folder), and copy the tokenizer into new_folder"
    )
