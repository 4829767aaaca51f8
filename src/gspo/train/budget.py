"""How many tokens of packed samples one forward and backward pass may hold."""

from __future__ import annotations

from typing import Any

ACTIVATION_BYTES = 2 * 2**30
_LARGEST_ROW = 16_384


def row_budget(config: Any, checkpointing: bool) -> int:
    """Tokens of a packed row whose activations fit `ACTIVATION_BYTES`.

    Args:
        config: the model's text config.
        checkpointing: layers are recomputed in the backward pass.
    """
    fits = ACTIVATION_BYTES // activation_bytes(config, checkpointing)
    return max(256, min(_LARGEST_ROW, fits))


def activation_bytes(config: Any, checkpointing: bool) -> int:
    """Rough float32 activations kept for the backward pass, per token."""
    width, layers = 4 * config.hidden_size, config.num_hidden_layers
    # Some 34 vectors of the hidden width per layer; with checkpointing, one layer's at a time.
    return width * (layers + 34) if checkpointing else width * layers * 34
