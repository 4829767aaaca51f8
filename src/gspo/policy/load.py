"""Load any Hugging Face causal LM, dense or MoE, into a `Policy` that is known to be exact."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gspo.dev import InternalModelConfig, LoraConfig
from gspo.errors import MissingDependencyError, ModelError, suggestion
from gspo.policy.attention import PACKED
from gspo.policy.embedded import PREFIX, RECIPES, embedded_folder
from gspo.policy.hf import attention_implementation, enable_checkpointing, quiet
from gspo.policy.logprob import Head
from gspo.policy.routing import Routing
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
        routing: the routers of an MoE model.
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
    routing: Routing = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.routing = Routing(self.lm, self.source)

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def backbone(self) -> torch.nn.Module:
        """The model below the vocabulary projection."""
        return getattr(self.lm, self.lm.base_model_prefix)

    @property
    def head(self) -> Head:
        """The vocabulary projection."""
        module = self.lm.get_output_embeddings()
        if not isinstance(module, torch.nn.Linear):
            raise ModelError(
                f"{self.source}: the output head is a {type(module).__name__}; gspo computes "
                "log-probs from a plain linear head (with LoRA, leave lm_head out)"
            )
        config = self.lm.config.get_text_config()
        return Head(module.weight, module.bias, getattr(config, "final_logit_softcapping", None))

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


def resolve(base_model: str) -> str:
    """The folder or hub id to load from.

    Raises:
        ModelError: no such embedded model, and no such folder.
    """
    if base_model.startswith(PREFIX):
        return str(embedded_folder(base_model))
    if Path(base_model).is_dir():
        if not (Path(base_model) / "config.json").exists():
            raise ModelError(f"base_model {base_model!r}: the folder has no config.json")
        return base_model
    near = suggestion(base_model, [PREFIX + name for name in RECIPES])
    if base_model.startswith((".", "/", "~")) or base_model.count("/") != 1:
        raise ModelError(
            f"unknown base_model {base_model!r}: it is not a folder.{near} Give a folder in "
            "Hugging Face layout, a hub id such as 'Qwen/Qwen3-0.6B', or 'embedded:sort'."
        )
    return base_model


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
    lm = _load_lm(str(full) if full else source, source, _device(config.device))
    tokenizer = AutoTokenizer.from_pretrained(source)
    _no_dropout(lm)
    if attention_implementation(lm) == "sdpa":
        lm.set_attn_implementation(PACKED)
    threads, workers = _threads(lm, config.threads)
    torch.set_num_threads(threads)
    peft = None
    if config.lora is not None:
        peft = _add_lora(lm, config.lora, checkpoint)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    limit = _context(lm, base_model, config.max_context)
    policy = Policy(
        lm=lm.eval(),
        peft=peft,
        tokenizer=tokenizer,
        source=source,
        compute_dtype=dtype,
        context=limit,
        checkpointing=config.activation_checkpointing,
        # peft swaps the experts' weights on the module while it computes, for every thread.
        workers=Workers(1 if peft else workers),
    )
    if policy.checkpointing:
        recompute_layers(policy)
    return policy


def save_weights(policy: Policy, folder: Path) -> None:
    """Weights and tokenizer in Hugging Face layout (with LoRA: the adapter in peft's)."""
    with quiet():
        if policy.peft is not None:
            policy.peft.save_pretrained(folder)
        else:
            policy.lm.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)


def _load_lm(path: str, source: str, device: torch.device) -> PreTrainedModel:
    with quiet():
        try:
            config = AutoConfig.from_pretrained(path)
            lm = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32)
        except (OSError, ValueError) as error:
            offline = "" if Path(path).is_dir() else " (hub ids need the network or its cache)"
            raise ModelError(f"cannot load base_model {source!r}{offline}: {error}") from error
    if getattr(lm, "is_quantized", False):
        raise ModelError(f"{source!r} holds quantized weights; dequantize it to train it")
    return lm.to(device)  # pyright: ignore[reportArgumentType]


def _add_lora(lm: PreTrainedModel, config: LoraConfig, checkpoint: Path | None) -> Any:
    try:
        import peft
    except ImportError:
        raise MissingDependencyError("peft", "peft", "LoRA") from None
    if checkpoint is not None:
        with _without_false_alarms():
            return peft.PeftModel.from_pretrained(lm, checkpoint, is_trainable=True)
    spec = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=config.target_modules,
        target_parameters=_expert_parameters(lm, config),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), _without_false_alarms():
        torch.manual_seed(0)
        return peft.get_peft_model(lm, spec)


@contextmanager
def _without_false_alarms() -> Iterator[None]:
    """peft warns of rank patterns that it set itself, and uses a deprecated name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*did not match any targeted module.*")
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*")
        yield


def _expert_parameters(lm: PreTrainedModel, config: LoraConfig) -> list[str] | None:
    """The experts' stacked 3-d weights, which are parameters and not linear modules."""
    if config.target_modules != "all-linear":
        return None
    names = [
        name
        for name, parameter in lm.named_parameters()
        if parameter.dim() == 3 and ".experts." in name
    ]
    return names or None


def recompute_layers(policy: Policy) -> None:
    """Activation checkpointing, by which a replayed route is replayed in the backward pass too."""
    enable_checkpointing(policy.lm, use_reentrant=False, context_fn=policy.routing.recompute)


def _no_dropout(lm: PreTrainedModel) -> None:
    """The ratio compares a policy with itself: a random mask would be noise in it."""
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # pyright: ignore[reportArgumentType]


def _context(lm: PreTrainedModel, base_model: str, wanted: int | None) -> int:
    own = getattr(lm.config.get_text_config(), "max_position_embeddings", None) or 2**31
    if wanted is not None and wanted > own:
        raise ModelError(f"max_context = {wanted}, but {base_model!r} has a context of {own}")
    return wanted or own


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
    cores = wanted or int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    small = lm.device.type == "cpu" and sum(p.numel() for p in lm.parameters()) < SMALL
    return (1, cores) if small else (cores, 1)
