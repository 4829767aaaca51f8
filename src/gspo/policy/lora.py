"""Put LoRA adapters into a model: new ones, or those of a checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gspo.core.errors import MissingDependencyError, ModelError
from gspo.dev import LoraConfig
from gspo.policy.source import check_no_pickles


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
    try:
        import peft
    except ImportError:
        raise MissingDependencyError("peft", "peft", "LoRA") from None
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft warns of rank patterns that it set itself, uses a deprecated name, and before 0.21
        # calls the experts, whose parameters it then adapts, a layer that it doesn't know.
        for message in (".*did not match any target", ".*gradient_checkpointing", ".*Experts"):
            warnings.filterwarnings("ignore", message=message)
        if checkpoint is not None:
            check_no_pickles(str(checkpoint))
            return peft.PeftModel.from_pretrained(lm, checkpoint, is_trainable=True)
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
    return adapted
