"""The loop of `gspo train` and `gspo demo`, and what surrounds it."""
