"""From trajectories to microbatches: tokens and numbers only."""
