"""Sampling: engines, and the OpenAI-compatible app before them."""
