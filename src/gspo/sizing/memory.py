"""Memory of one GPU that trains, by part: what AdamW, sharded weights and a microbatch need."""

from __future__ import annotations

from dataclasses import dataclass

from gspo.sizing.model_size import ModelSize

HEAD_TOKENS = 1024
"""Tokens whose float32 logits, and what their backward pass needs, exist at once."""
_LOGITS = 3
_BACKWARD, _BACKWARD_OF_EXPERTS = 0.5, 1.0
"""Gradients of a layer's activations that exist at once, as a share of the activations: beside
experts those of all copies of their tokens do."""
_GATHERED_LAYERS = 2
"""Of sharded weights: the layer that computes, and the next, which is on its way."""


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
