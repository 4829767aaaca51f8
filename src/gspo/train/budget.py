"""How many tokens of packed samples one forward and backward pass may hold."""

from __future__ import annotations

from typing import Any

ACTIVATION_BYTES = 2 * 2**30
_FEWEST, _MOST = 256, 16_384


def token_budget(config: Any, checkpointing: bool) -> int:
    """Tokens of a microbatch whose activations fit `ACTIVATION_BYTES`.

    Args:
        config: the model's text config.
        checkpointing: layers are recomputed in the backward pass.
    """
    fitting = ACTIVATION_BYTES // activation_bytes(config, checkpointing)
    return max(_FEWEST, min(_MOST, fitting))


def activation_bytes(config: Any, checkpointing: bool) -> int:
    """Rough number of bytes of float32 activations per token, kept for the backward pass."""
    width, layers = 4 * config.hidden_size, config.num_hidden_layers
    # About 34 vectors of the hidden width per layer; with checkpointing, those of one layer only.
    return width * (layers + 34) if checkpointing else width * layers * 34
