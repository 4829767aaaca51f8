"""From trajectories to packed batches: tokens and numbers only."""
