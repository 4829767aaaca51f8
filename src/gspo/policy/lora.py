"""Put LoRA adapters into a model: new ones, those of a checkpoint, or merged into its weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from gspo.core.errors import MissingDependencyError, ModelError
from gspo.dev import LoraConfig
from gspo.policy.source import check_no_pickles

_DOUBLED, _OTHERS = r".*\.gate_up_proj", r".*\.(?!gate_up_proj$)[^.]+"


def add_lora(lm: PreTrainedModel, config: LoraConfig, checkpoint: Path | None) -> Any:
    """Make the PeftModel around `lm`, whose adapters are the only weights that are trained.

    Args:
        lm: the base model; adapters are put into it.
        config: rank, scale and places.
        checkpoint: a folder with adapters to go on from.

    Raises:
        MissingDependencyError: peft is not installed.
        ModelError: peft finds no place for adapters, or the checkpoint's are pickled.
    """
    with quiet_peft() as peft, torch.random.fork_rng(devices=[]):
        if checkpoint is not None:
            check_no_pickles(str(checkpoint))
            adapted = peft.PeftModel.from_pretrained(lm, checkpoint, is_trainable=True)
            _match_patterns(adapted.peft_config["default"])
            return adapted
        # The experts' weights are stacked: 3-d parameters, which are no linear modules.
        experts = [n for n, p in lm.named_parameters() if p.dim() == 3 and ".experts." in n]
        spec = peft.LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
            target_modules=config.target_modules,
            target_parameters=(experts or None) if config.target_modules == "all-linear" else None,
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(0)
        try:
            adapted = peft.get_peft_model(lm, spec)
            with torch.no_grad():  # Llama 4's router is a linear layer that returns two values
                lm(input_ids=torch.ones(1, 2, dtype=torch.long, device=lm.device), use_cache=False)
        except (ValueError, RuntimeError, AttributeError, TypeError) as error:
            raise ModelError(
                f"LoRA on {type(lm).__name__} with target_modules = {config.target_modules!r} "
                "does not work: name the linear layers that get adapters, such as "
                "LoraConfig(target_modules=['q_proj', 'v_proj']), or train all weights without "
                f"lora. peft says: {error}"
            ) from error
    _match_patterns(adapted.peft_config["default"])
    return adapted


def merge_adapter(lm: PreTrainedModel, folder: str) -> PreTrainedModel:
    """The model with the adapter of a folder added to its weights, and no adapter left.

    Raises:
        MissingDependencyError: peft is not installed.
        ModelError: the adapter is pickled, damaged, or of another model.
    """
    check_no_pickles(folder)
    with quiet_peft() as peft:
        try:
            return peft.PeftModel.from_pretrained(lm, folder).merge_and_unload(safe_merge=True)
        except (ValueError, RuntimeError, KeyError, OSError, SafetensorError) as error:
            raise ModelError(
                f"the LoRA adapter {folder!r} doesn't fit {type(lm).__name__} of "
                f"{lm.name_or_path!r}, or is damaged: {error}"
            ) from error


def merged_weights(lm: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a model by the names that they have without adapters. One with an
    adapter is merged with it in float32, beside the model, when its turn comes."""
    adapted: dict[int, list[Any]] = {}
    modules: Iterator[Any] = lm.modules()
    for module in modules:
        if hasattr(module, "get_delta_weight"):
            inner = module.get_base_layer()
            of = getattr(inner, getattr(module, "parameter_name", "weight"))
            adapted.setdefault(id(of), []).append(module)
    for name, weight in lm.named_parameters():
        if ".lora_" in name:
            continue
        value = weight.detach()
        for module in adapted.get(id(weight), ()):
            value = value.float() + module.get_delta_weight(module.active_adapters[0])
        yield name.replace(".base_layer", ""), value


@contextmanager
def quiet_peft() -> Iterator[ModuleType]:
    """peft, without the warnings that say nothing here.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise MissingDependencyError("peft", "peft", "LoRA") from None
    with warnings.catch_warnings():
        # peft warns of rank patterns that it set itself, uses a deprecated name, and before 0.21
        # calls the experts, whose parameters it then adapts, a layer that it doesn't know. An
        # adapter on top of another one has no config.json to look up.
        said = ("did not match any target", "gradient_checkpointing", "Experts", "find a config")
        for message in said:
            warnings.filterwarnings("ignore", message=f".*{message}")
        yield peft


def _match_patterns(config: Any) -> None:
    """Say the rank of stacked gate and up projections so that whoever loads the adapter is not
    warned.

    peft doubles rank and scale there by a pattern that names a parameter, and warns, each time that
    it loads such an adapter, that the pattern names no layer. Turned around, the same ranks need
    no warning: the doubled ones are the rule, and the pattern names everything else.
    """
    for patterns, rule in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        if list(getattr(config, patterns) or {}) == [_DOUBLED]:
            doubled, usual = getattr(config, patterns)[_DOUBLED], getattr(config, rule)
            setattr(config, rule, doubled)
            setattr(config, patterns, {_OTHERS: usual})
