"""From a rollout batch to new weights: minibatches, optimizer steps, checkpoints."""
