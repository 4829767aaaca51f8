"""Whether the Hugging Face hub can be reached. Its own client asks for 20 s before it says so."""

from __future__ import annotations

import httpx
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE


def hub_answers() -> bool:
    """Whether the hub, or the mirror of HF_ENDPOINT, answers within 3 s."""
    try:
        return not HF_HUB_OFFLINE and httpx.head(ENDPOINT, timeout=3) is not None
    except httpx.HTTPError:  # a proxy that may not reach it, too
        return False
