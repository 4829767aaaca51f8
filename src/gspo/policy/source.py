"""Find and read a model by its name, folder or hub id.

No pickle is loaded, and no code of a model folder is run unless `trust_remote_code=True` asks for
it: there is no question at the terminal.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
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
from gspo.core.hub import hub_answers
from gspo.kernels.hf import quiet, sharding
from gspo.kernels.sharded import begin_sharded
from gspo.policy.embedded import PREFIX, RECIPES, embedded_folder

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PIECE, _PIECES = 2**20, 64
"""Bytes of a piece of a file that is compared, and how many of a large file."""
_REFUSALS = (OSError, ValueError, ImportError, AttributeError, KeyError, SafetensorError)


def resolve(base_model: str) -> str:
    """Find the folder or hub id to load from. An adapter's folder stands for its model with it.

    Raises:
        ModelError: no such embedded model, no such folder, or an adapter whose model is not here.
    """
    if base_model.startswith(PREFIX):
        return str(embedded_folder(base_model))
    folder = Path(base_model)
    if base := adapted_model(base_model):
        try:
            resolve(base)
        except ModelError:
            raise ModelError(
                f"{base_model!r} is a LoRA adapter of {base!r}, which is not a folder "
                f"here: write where that model is into base_model_name_or_path of "
                f"{folder / 'adapter_config.json'}"
            ) from None
    is_path = base_model.startswith((".", "/", "~")) or base_model.count("/") != 1
    if is_path and not folder.is_dir():
        near = suggestion(base_model, [PREFIX + name for name in RECIPES])
        raise ModelError(
            f"unknown model {base_model!r}: it is not a folder.{near} Give a folder in "
            "Hugging Face layout, a hub id such as 'Qwen/Qwen3-0.6B', or 'embedded:sort'."
        )
    return base_model


def adapted_model(source: str) -> str | None:
    """The folder or hub id of the model that an adapter is of; None if `source` is no adapter.

    Raises:
        ModelError: its adapter_config.json doesn't name one.
    """
    path = Path(source) / "adapter_config.json"
    if not path.exists() or (Path(source) / "config.json").exists():
        return None
    try:
        base = json.loads(path.read_bytes())["base_model_name_or_path"]
        if not isinstance(base, str) or not base:
            raise TypeError(f"it is {base!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} doesn't say which model the adapter is of: base_model_name_or_path: {error}"
        ) from None
    return base


def adapters_below(source: str) -> tuple[str, list[str]]:
    """The model that `source` begins with, and the adapters that go into it, first to last."""
    adapters: list[str] = []
    while base := adapted_model(source):
        adapters.insert(0, source)
        source = base
    return source, adapters


def read_config(source: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read the model's config.

    Raises:
        ModelError: it cannot be read, or asks for code of the folder.
    """
    return _read(AutoConfig, adapters_below(source)[0], trust_remote_code)


def fingerprint(source: str, *, trust_remote_code: bool = False) -> str:
    """What tells a model from another one of the same name: of a folder's files, their sizes and
    their content (of large ones so many pieces that other weights show); of a hub id, the commit.

    Raises:
        ModelError: see `read_config`.
    """
    if not Path(source).is_dir():
        config = read_config(source, trust_remote_code=trust_remote_code)
        return f"commit {getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(source).iterdir() if p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for place in range(0, size, max(_PIECE, size // _PIECES)):
                digest.update(os.pread(file.fileno(), _PIECE, place))
    return digest.hexdigest()[:16]


def empty_model(source: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config without numbers: its weights are on the meta device.

    Raises:
        ModelError: see `read_config`.
    """
    config = read_config(source, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def read_tokenizer(source: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Read the model's tokenizer; an adapter's own, if it has one.

    Raises:
        ModelError: there is none, or it asks for code of the folder.
    """
    base, adapters = adapters_below(source)
    own = [path for path in adapters if (Path(path) / "tokenizer_config.json").exists()]
    return _read(AutoTokenizer, own[-1] if own else base, trust_remote_code)


def read_model(
    path: str,
    source: str,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
    ranks: int = 1,
    ep_size: int = 1,
    half: bool = False,
) -> PreTrainedModel:
    """Read a causal LM.

    Args:
        path: folder or hub id of the weights.
        source: what the user calls the model.
        trust_remote_code: run code of the folder, if its config asks for it.
        dtype: of the weights, but for those that the architecture keeps in float32.
        ranks: processes that read the model at the same time and hold a part of it each.
        ep_size: how many of them share one set of experts.
        half: they compute in bfloat16.

    Raises:
        ModelError: unknown model or architecture, pickled or quantized weights.
    """
    check_no_pickles(path)
    if ep_size > 1:
        check_experts(empty_model(path, trust_remote_code=trust_remote_code), source, ep_size)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    if ranks > 1:
        options |= sharding(ranks, ep_size, half=half)
    lm = _read(AutoModelForCausalLM, path, trust_remote_code, source, **options)
    if getattr(lm, "is_quantized", False):
        raise ModelError(f"{source!r} holds quantized weights; dequantize it to train it")
    if ranks > 1:
        begin_sharded(lm)
        # Else to save it would gather the weights of all ranks, whatever is to be written.
        lm.config.distributed_config = None
    return lm


def check_experts(lm: PreTrainedModel, source: str, ep_size: int) -> None:
    """Refuse to divide experts that a model doesn't have.

    Args:
        lm: of the config; its weights may be on the meta device.
        source: what the user calls it.
        ep_size: how many processes share one set of experts.

    Raises:
        ModelError: names the model and how many experts it has.
    """
    stacked = {p.shape[0] for n, p in lm.named_parameters() if p.dim() == 3 and ".experts." in n}
    experts = min(stacked, default=0) if getattr(lm, "ep_plan", None) else 0
    if ep_size > 1 and (not experts or experts % ep_size):
        raise ModelError(
            f"ep_size={ep_size}: {source!r} has {experts} experts that transformers can divide "
            "among processes: leave ep_size out, or give a divisor of their number"
        )


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
    options |= {"local_files_only": not is_folder and not hub_answers()}
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
        if is_folder and (saved := sorted(Path(path).glob("checkpoints/[0-9]*"))):
            reason = f": it is the folder of a run: give one of its checkpoints, {str(saved[-1])!r}"
        what = "the tokenizer of " if auto is AutoTokenizer else ""
        raise ModelError(f"cannot load {what}{name or path!r}{reason}") from error
