"""Load any Hugging Face causal LM, dense or MoE, into a `Policy` that is known to be exact."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gspo.core.compute import free_cores
from gspo.core.errors import ModelError
from gspo.dev import InternalModelConfig
from gspo.kernels import hf
from gspo.kernels.attention import PACKED
from gspo.kernels.logprob import Head
from gspo.policy.context import settle_context
from gspo.policy.logits import logit_scale, soft_cap
from gspo.policy.lora import add_lora
from gspo.policy.moe import Routers
from gspo.policy.source import read_model, read_tokenizer, resolve
from gspo.policy.workers import Workers

log = logging.getLogger("gspo")

Packing = Literal["flex", "buckets", "mask", "mask_by_type", "single"]
OWN: frozenset[Packing] = frozenset({"flex", "buckets"})
"""Ways of packing that go through gspo's attention, where no T x T mask is made."""
SHARING: frozenset[Packing] = frozenset({"flex", "buckets", "mask_by_type"})
"""Ways of packing by which samples of a row can share a prefix."""
SMALL = 20_000_000  # parameters below which threads inside an operation slow a step down


@dataclass
class Policy:
    """A model that can be sampled from and trained; engine and trainer share it.

    Attributes:
        lm: the causal LM (with adapters injected, where LoRA is used).
        peft: the PeftModel around it, or None for full fine-tuning.
        tokenizer: the model's own.
        source: folder or id that the base weights came from.
        compute_dtype: float32, or bfloat16 (autocast); weights are float32.
        context: longest sample in tokens.
        packing: how samples share a row, the first that is exact: `flex` (gspo's attention on a
            GPU) or `buckets` (on a CPU), `mask` (transformers' block-diagonal mask, which the model
            makes from the positions), `mask_by_type` (the same, made for each layer type and handed
            in), or `single` (one forward pass a sample).
        shares_prefixes: samples of a row may share their prefixes: proved on the model itself.
        checkpointing: layers are recomputed in the backward pass.
        version: policy version, counted up by every update.
        workers: threads that train a row each.
        entries: entries of the vocabulary that are tokens, or None: all rows of the head. The rows
            behind them pad the head; log-probs are over the tokens alone.
        logit_scale: factor between the head's product and the logits; None: found on the model.
        routers: of an MoE model; none in a dense one.
    """

    lm: PreTrainedModel
    peft: Any
    tokenizer: PreTrainedTokenizerBase
    source: str
    compute_dtype: torch.dtype
    context: int
    packing: Packing = "buckets"
    shares_prefixes: bool = False
    checkpointing: bool = False
    version: int = 0
    workers: Workers = field(default_factory=Workers, repr=False)
    entries: int | None = None
    logit_scale: float | None = None
    routers: Routers = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.routers = Routers(self.lm, self.source)
        if self.logit_scale is None:
            self.logit_scale = logit_scale(self.lm, self.source)

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def backbone(self) -> torch.nn.Module:
        """The model below the vocabulary projection."""
        return hf.backbone(self.lm)

    @property
    def head(self) -> Head:
        """The vocabulary projection."""
        module = hf.output_embeddings(self.lm)
        if not isinstance(module, torch.nn.Linear):
            raise ModelError(
                f"{self.source}: the output head is a {type(module).__name__}; gspo computes "
                "log-probs from a plain linear head (with LoRA, leave lm_head out)"
            )
        scale = 1.0 if self.logit_scale is None else self.logit_scale
        return Head(module.weight, module.bias, soft_cap(self.lm), scale, self.entries)

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Trained parameters by name, in a fixed order."""
        return {n: p for n, p in self.lm.named_parameters() if p.requires_grad}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside the block the adapters are off: the base model (LoRA only)."""
        assert self.peft is not None
        with self.peft.disable_adapter():
            yield


def autocast(policy: Policy) -> AbstractContextManager[object]:
    """Where the policy computes in half precision: that; else nothing."""
    if policy.compute_dtype == torch.float32:
        return nullcontext()
    return torch.autocast(policy.device.type, dtype=policy.compute_dtype)


def load_policy(
    base_model: str, config: InternalModelConfig | None = None, *, checkpoint: Path | None = None
) -> Policy:
    """Load `base_model`, or the weights of a checkpoint of it.

    Args:
        base_model: `embedded:<task>`, a folder in Hugging Face layout, or a hub id.
        config: precision, LoRA and context.
        checkpoint: a folder written by `save_weights`, which then stands for the weights.

    Raises:
        ModelError: unknown model, unusable architecture, or a context beyond the model's.
    """
    config = config or InternalModelConfig()
    source = resolve(base_model)
    full = checkpoint if checkpoint is not None and config.lora is None else None
    trust, device = config.trust_remote_code, _device(config.device)
    lm = read_model(str(full or source), base_model, trust_remote_code=trust)
    lm = lm.to(device).eval()  # pyright: ignore[reportArgumentType]
    tokenizer = read_tokenizer(source, trust_remote_code=trust)
    if hf.attention_implementation(lm) == "sdpa":
        lm.set_attn_implementation(PACKED)
    limit = settle_context(lm, base_model, config.max_context)
    threads, workers = _threads(lm, config.threads)
    torch.set_num_threads(threads)
    peft = None
    if config.lora is not None:
        peft = add_lora(lm, config.lora, checkpoint)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    policy = Policy(
        lm=lm.eval(),
        peft=peft,
        tokenizer=tokenizer,
        source=source,
        compute_dtype=dtype,
        context=limit,
        entries=_entries(tokenizer),
        checkpointing=config.activation_checkpointing,
        # peft swaps the experts' weights on the module while it computes, for every thread.
        workers=Workers(1 if peft else workers),
    )
    if policy.checkpointing:
        recompute_layers(policy)
    return policy


def save_weights(policy: Policy, folder: Path) -> None:
    """Weights and tokenizer in Hugging Face layout (with LoRA: the adapter in peft's)."""
    with hf.quiet():
        if policy.peft is not None:
            policy.peft.save_pretrained(folder)
        else:
            policy.lm.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)


def recompute_layers(policy: Policy) -> None:
    """Activation checkpointing, by which a replayed route is replayed in the backward pass too."""
    hf.recompute_layers(policy.lm, policy.routers.recompute)


def _entries(tokenizer: PreTrainedTokenizerBase) -> int:
    """Token ids that the tokenizer has, added ones too; heads are often padded beyond them."""
    return max(tokenizer.get_vocab().values()) + 1


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device = {name!r}, but torch sees no CUDA device: use 'auto' or 'cpu'")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device = {name!r}: {error}") from None


def _threads(lm: PreTrainedModel, wanted: int | None) -> tuple[int, int]:
    """(OpenMP threads, workers) that together use `wanted` cores."""
    cores = wanted or int(os.environ.get("OMP_NUM_THREADS") or free_cores())
    small = lm.device.type == "cpu" and sum(p.numel() for p in lm.parameters()) < SMALL
    return (1, cores) if small else (cores, 1)
