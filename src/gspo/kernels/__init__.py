"""Tensors in, tensors out: attention, its caches, log-probs; and the one door to transformers."""
