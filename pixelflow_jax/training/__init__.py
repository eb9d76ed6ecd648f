"""Training: optimizer and state, the step, checkpoints, metrics, and the loop that joins them."""
