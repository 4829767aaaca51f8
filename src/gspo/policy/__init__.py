"""The model itself: loading, the packed forward pass, and log-probs without full logits."""
