"""What a model weighs, from its config alone, and the memory of one GPU that trains it.

No weights are read or made. The memory is what AdamW, sharded weights and a microbatch need.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gspo.core.errors import ModelError, suggestion
from gspo.policy.embedded import PREFIX, RECIPES, build_model, embedded_task
from gspo.policy.source import read_config, resolve

SHIPPED = Path(__file__).with_name("configs.json")
"""Configs of well-known models, so that they can be planned for without a network."""
HEAD_TOKENS = 1024
"""Tokens whose float32 logits, and what their backward pass needs, exist at once."""
_LOGITS = 3
_BACKWARD, _BACKWARD_OF_EXPERTS = 0.5, 1.0
"""Gradients of a layer's activations that exist at once, as a share of the activations: beside
experts those of all copies of their tokens do."""
_GATHERED_LAYERS = 2
"""Of sharded weights: the layer that computes, and the next, which is on its way."""


@dataclass(frozen=True)
class ModelSize:
    """Counts of a model. "Weights" are numbers, not bytes.

    Attributes:
        parameters: all of them, a tied head once.
        active: weights of the layers that one token is multiplied with: k of E experts.
        expert: weights of all experts together; 0 for a dense model.
        experts, experts_per_token: E and k; 0 for a dense model.
        head: weights of the vocabulary projection, vocabulary x width.
        tied: the head's weights are the embedding's.
        vocabulary, width, layers: as in the config.
        outputs: numbers that the linear maps of an average layer give a token, and the copies of it
            that its experts get.
        lora_rank_one: weights of LoRA adapters of rank 1 on all linear maps, experts included.
        query_width: query heads times their size, of a layer with attention.
        kv_width: numbers that a token leaves in the KV cache of a layer with attention.
        attention_layers: layers whose cost grows with the length of the sequence.
        context: tokens that a sequence may have; 0: the config names no limit.
    """

    parameters: int
    active: int
    expert: int
    experts: int
    experts_per_token: int
    head: int
    tied: bool
    vocabulary: int
    width: int
    layers: int
    outputs: float
    lora_rank_one: int
    query_width: int
    kv_width: int
    attention_layers: int
    context: int


def read_size(model: str) -> ModelSize:
    """Count what `model` (a shipped name, an embedded model, a folder or a hub id) holds.

    Raises:
        ModelError: there is no such model, or its config has no causal language model.
    """
    if model.startswith(PREFIX):
        lm = build_model(RECIPES[embedded_task(model)].get("context"))
        return count(lm, lm.config)
    shipped = json.loads(SHIPPED.read_text())
    if model in shipped:
        config = AutoConfig.for_model(**shipped[model])
    else:
        try:
            config = read_config(resolve(model))
        except ModelError as error:
            near, known = suggestion(model, shipped), ", ".join(shipped)
            raise ModelError(f"{error}{near} Configs that gspo knows: {known}") from None
    text = config.get_text_config()
    try:
        with torch.device("meta"):
            return count(AutoModelForCausalLM.from_config(text), text)
    except (AttributeError, TypeError, ValueError) as error:  # transformers lists all it knows
        told = str(error).partition("\n")[0]
        raise ModelError(f"{model!r} is no causal language model with attention: {told}") from None


def count(lm: Any, config: Any) -> ModelSize:
    """Count the weights of a model, of which only names and shapes are looked at."""
    experts = _first(config, "num_local_experts", "num_experts", "n_routed_experts")
    chosen = _first(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk")
    active = expert = lora = 0
    outputs = 0.0
    for name, weight in lm.named_parameters():
        # A layer is one of several with numbers: layers.0, h.0 or blocks.0.
        if not any(map(str.isdecimal, name.split("."))) or weight.dim() < 2:
            continue
        shape = tuple(weight.shape)
        if ".experts." not in name:
            active += weight.numel()
            outputs += shape[0]
            lora += sum(shape[:2])
        elif weight.dim() == 3:  # stacked: (experts, one side, the other)
            expert += weight.numel()
            inner = sum(shape[1:]) - config.hidden_size
            # Experts also keep their own copy of each token's input.
            outputs += chosen * (config.hidden_size if "down" in name else inner)
            outputs += 0 if "down" in name else chosen * config.hidden_size
            lora += shape[0] * sum(shape[1:])
    if expert:
        active += expert * chosen // experts
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    latent = getattr(config, "kv_lora_rank", None)  # DeepSeek keeps one latent vector for all heads
    kinds = getattr(config, "layer_types", None) or ["attention"] * config.num_hidden_layers
    return ModelSize(
        parameters=sum(weight.numel() for weight in lm.parameters()),
        active=active,
        expert=expert,
        experts=experts if expert else 0,
        experts_per_token=chosen if expert else 0,
        head=config.vocab_size * config.hidden_size,
        tied=bool(config.tie_word_embeddings),
        vocabulary=config.vocab_size,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        outputs=outputs / config.num_hidden_layers,
        lora_rank_one=lora,
        query_width=heads * (getattr(config, "qk_head_dim", None) or size),
        kv_width=latent + config.qk_rope_head_dim
        if latent
        else 2 * size * (getattr(config, "num_key_value_heads", None) or heads),
        attention_layers=sum("linear" not in kind for kind in kinds),
        context=_first(config, "max_position_embeddings"),
    )


def _first(config: Any, *names: str) -> int:
    return next((found for name in names if (found := getattr(config, name, None))), 0)


@dataclass(frozen=True)
class Training:
    """How weights are trained.

    Attributes:
        lora: rank of the adapters, or None: all weights.
        base_bytes: bytes of a weight that is not trained: 2 for bfloat16, 4 for float32.
        checkpointing: activations of a layer are computed again in the backward pass.
    """

    lora: int | None = None
    base_bytes: int = 2
    checkpointing: bool = True

    def about(self) -> str:
        """In a few words.

        >>> Training(lora=16).about()
        'LoRA 16 on a bfloat16 base, checkpointing'
        """
        base = {2: "bfloat16", 4: "float32"}[self.base_bytes]
        what = "all weights" if self.lora is None else f"LoRA {self.lora} on a {base} base"
        return f"{what}, checkpointing" if self.checkpointing else what


def training_bytes(size: ModelSize, how: Training, tokens: int, gpus: int) -> dict[str, float]:
    """Bytes on each of `gpus` GPUs that share one sharded copy, by part.

    All weights: 16 bytes a weight (float32 weight, gradient, two moments of AdamW). Activations
    are bfloat16: the input of each layer, and everything of each layer; with checkpointing
    everything of one layer at a time.

    Args:
        size: the model.
        how: it is trained.
        tokens: of a microbatch of one GPU.
        gpus: that the state is spread over (FSDP2).
    """
    adapters = 0 if how.lora is None else how.lora * size.lora_rank_one
    trained = size.parameters if how.lora is None else adapters
    base = 0 if how.lora is None else how.base_bytes * size.parameters
    backward = _BACKWARD_OF_EXPERTS if size.experts else _BACKWARD
    layer = 2.0 * tokens * (2 * size.outputs + 2 * size.width)
    kept = 1 if how.checkpointing else size.layers
    inputs = 2.0 * tokens * size.width * size.layers
    body = size.parameters - size.head * (1 if size.tied else 2)
    of_gathered = 2 if how.lora is None else 1  # bfloat16 weights, and gradients where trained
    gathered = _GATHERED_LAYERS * 2 * body / size.layers + of_gathered * 2 * size.head
    return {
        "weights": (4 * trained + base) / gpus,
        "gradients": 4 * trained / gpus,
        "AdamW": 8 * trained / gpus,
        "gathered": gathered if gpus > 1 else 0,
        "activations": inputs + (kept + backward) * layer,
        "logits": 4.0 * _LOGITS * HEAD_TOKENS * size.vocabulary,
    }


def most_tokens(size: ModelSize, how: Training, gpus: int, free: float) -> int:
    """Largest microbatch of one GPU with `free` bytes, in whole thousands of tokens; 0: none."""
    fixed = sum(training_bytes(size, how, 0, gpus).values())
    each = training_bytes(size, how, 1, gpus)["activations"]
    return max(0, int((free - fixed) / each) // 1024 * 1024)
