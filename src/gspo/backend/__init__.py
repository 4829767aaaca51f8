"""Backends join an engine and a trainer, and own the run folder."""
